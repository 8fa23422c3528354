"""The sections of the page that boards give: tables, pictures, classes or genes."""

from eval.report import html, pictures, sections
from eval.report.style import Picture
from eval.report.tables import Board

Section = tuple[str, str, str]
_OVERLAP = "overlapping bars settle no comparison; the paired differences in the table do."
_RARE = "the F1 of a rare class depends on how rare it is, so it does not carry over to other data."


def probe_sections(boards: list[Board], drawn: list[Picture]) -> list[Section]:
    """Table, picture and classes of every board; pictures are added to `drawn`."""
    out = []
    many = len(boards) > 1
    for i, board in enumerate(boards):
        end = f"-{i + 1}" if many else ""
        place = " · ".join(
            p for p in (board.benchmark, board.task, board.protocol, board.split) if p
        )
        of = f": {place}" if many else ""
        body = [sections.probe_notes(board), sections.probe_table(board)]
        whiskers = pictures.dots_and_whiskers(board, f"probes{end}")
        if whiskers:
            drawn.append(whiskers)
            caption = (
                "Dots are values, bars 95 % intervals, the dashed line is the best floor. What "
                "lies to the right of it is better than what can be had without pretraining."
            )
            body.append(html.figure(whiskers, caption, warn=_OVERLAP))
        out.append((f"probes{end}", f"Probes{of}", "\n".join(body)))
        if board.is_regression and board.encoders:
            out.append((f"genes{end}", f"Genes{of}", sections.gene_table(board)))
            continue
        classes = _classes(board, drawn, end)
        if classes:
            out.append((f"classes{end}", f"Classes{of}", classes))
    return out


def _classes(board: Board, drawn: list[Picture], end: str) -> str:
    if not board.encoders or not board.metrics():
        return ""
    body = [sections.class_table(board)]
    f1 = pictures.class_f1(board, f"class-f1{end}")
    if f1:
        drawn.append(f1)
        caption = "F1 of each class with its 95 % interval; rings are the floors."
        body.append(html.figure(f1, caption, warn=_RARE))
    matrix = pictures.confusions(board, f"confusion{end}")
    if matrix:
        drawn.append(matrix)
        caption = (
            "Confusion matrices. Each row is a true class and adds up to 100 %; the diagonal is "
            "the recall of the class, and its mean is the balanced accuracy. Counts stand beneath."
        )
        body.append(html.figure(matrix, caption))
    else:
        body.append(
            html.missing("No predictions lie beside the results, so there is no confusion matrix.")
        )
    return "\n".join(body)
