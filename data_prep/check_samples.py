"""What can be wrong with the samples of a set, and with its tar files: a list of sentences."""

import tarfile

import numpy as np

from lemon_muse.data.shards import COLUMNS, ROI_COLUMNS, ROI_FACTS, Index


def compare_tars(index: Index) -> list[str]:
    """What a plain tar reader sees must be what the index says."""
    listed = {shard["name"] for shard in index.header["shards"]}
    problems = [
        f"{path.name} is in the folder but not in the index; plain tar readers would read it: "
        f"run the job that made the set again, or delete it"
        for path in sorted(index.folder.glob(f"{index.kind}-*.tar"))
        if path.name not in listed
    ]
    for number, shard in enumerate(index.header["shards"]):
        mine = index.blocks[index.blocks["shard"] == number]
        said = {int(o) for o in mine["offset"]} | {int(o) for o in mine["meta_offset"]}
        try:
            with tarfile.open(index.shard(number)) as tar:
                found = {m.offset_data for m in tar.getmembers()}
        except (tarfile.TarError, OSError) as error:
            problems.append(f"{shard['name']} is not a readable tar file: {error}")
            continue
        if found != said:
            problems.append(f"{shard['name']} has {len(found)} members, the index {len(said)}")
    return problems


def wrong_block(columns: dict[str, np.ndarray], count: int) -> list[str]:
    problems = [f"column '{c}' is missing" for c in COLUMNS if c not in columns]
    problems += [
        f"column '{k}' has {len(v)} rows for {count} crops"
        for k, v in columns.items()
        if len(v) != count
    ]
    if not problems and not np.isfinite([columns["x"], columns["y"]]).all():
        problems.append("coordinates are not finite")
    if not problems and not (columns["source_mpp"] > 0).all():
        problems.append("a source mpp is missing")
    return problems


def wrong_roi(
    index: Index, block: int, image: np.ndarray, columns: dict[str, np.ndarray]
) -> list[str]:
    missing = [c for c in (*ROI_COLUMNS, *ROI_FACTS) if c not in columns]
    if missing:
        return [f"column '{c}' is missing" for c in missing]
    problems = []
    row, side = index.blocks[block], index.size
    if image.shape != (side, side, 3):
        problems.append(f"the picture is {image.shape[1]} x {image.shape[0]} px, not {side}")
    if any(len(columns[c]) != row["count"] for c in ROI_COLUMNS):
        problems.append(f"the index says {row['count']} nuclei")
    elif len(columns["x"]):
        xy = np.stack([columns["x"], columns["y"]], 1)
        if not ((xy >= 0) & (xy <= side)).all():
            problems.append("a nucleus lies outside the ROI")
        inside = xy[: row["inner"]]
        margin = index.header["margin"] - 0.51
        if not ((inside >= margin) & (inside <= side - margin)).all():
            problems.append("a nucleus without a whole window is among the inner ones")
    if not columns["source_mpp"][0] > 0:
        problems.append("the source mpp is missing")
    return problems
