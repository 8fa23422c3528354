"""MIDOG++: mitotic figures of seven tumour types, dogs and humans (Aubreville, Sci Data 2023).

Task `mitosis`: a mitotic figure against an imposter (what looks like one to a detector or a rater).
Task `atypical`: an atypical mitotic figure against a normal one; LEMON calls this MIDOG++.
"""

import logging
from pathlib import Path

import numpy as np

from eval import plans
from eval.benchmarks import DEFAULT, Paper, Request, task_of
from eval.benchmarks.midogpp.atypical import read_atypical
from eval.benchmarks.midogpp.files import Found
from eval.benchmarks.midogpp.mitosis import read_mitosis
from lemon_muse.data.table import Table

log = logging.getLogger(__name__)

# The benchmark of foundation models (arXiv 2508.04441) draws anew for each seed and train size.
SEEDS = (42, 43, 44, 45, 46)
TRAIN_SIZES = (0.001, 0.01, 0.1, 1.0)


class MidogPP:
    """Tell mitotic figures from imposters, or atypical ones from normal ones."""

    name = "midogpp"
    version = "1"
    tasks = ("mitosis", "atypical")

    def load(self, root: Path, request: Request = DEFAULT) -> Table:
        """Read the folder; what is odd but can be worked with is logged.

        Raises:
            UserError: the wrong folder, a missing or damaged file, an unknown resolution.
        """
        found = self._read(Path(root), request)
        for note in found.notes:
            log.warning("%s", note)
        return found.table

    def check(self, root: Path, request: Request = DEFAULT) -> list[str]:
        """What differs from the published data, what is odd, and where the mpp is from."""
        found = self._read(Path(root), request)
        return [*found.facts, *found.notes]

    def folds(self, table: Table, request: Request = DEFAULT) -> list[plans.Fold]:
        """Five folds by patient; under protocol=paper the divisions of the two papers."""
        if request.protocol == "default":
            return plans.grouped(table, seed=request.seed)
        if task_of(self, request) == "atypical":
            return plans.random(table, seed=request.seed)
        return random_fifths(len(table))

    def paper(self, task: str) -> Paper:
        """The published protocols: Ammeling et al. for mitosis, LEMON for atypical."""
        if task == "atypical":
            return Paper(
                source="LEMON (arXiv 2603.25802)",
                probes=("logistic",),
                says="random folds of single nuclei: cells of one slide stand on both sides ('we "
                "didn't use any metadata for splits'); how many folds is not stated, here 5.",
            )
        return Paper(
            source="Ammeling et al., arXiv 2508.04441",
            probes=("uni",),
            says="for each of the seeds 42 to 46 a random 20 % of the annotations is tested and "
            "64 % trains: cells of one slide stand on both sides, and each seed has a test set of "
            "its own.",
        )

    def _read(self, root: Path, request: Request) -> Found:
        if task_of(self, request) == "atypical":
            return read_atypical(root, request)
        return read_mitosis(root, request)


def random_fifths(count: int) -> list[plans.Fold]:
    """The divisions of arXiv 2508.04441, one a seed, with all of the training data.

    Drawn in the order of the public script, so that with the complete MIDOG++ list (in its own
    order) they are the script's, index for index. `val` is the fifth that the script leaves unused.
    """
    folds = []
    for seed in SEEDS:
        generator = np.random.default_rng(seed)
        test = generator.choice(count, size=int(count * 0.2), replace=False)
        pool = np.setdiff1d(np.arange(count), test)
        train = pool
        for share in TRAIN_SIZES:
            drawn = int(len(pool) * share)
            if drawn:
                train = generator.choice(pool, size=drawn, replace=False)
            if drawn and int(0.8 * drawn):
                train = generator.choice(train, size=int(0.8 * drawn), replace=False)
        val = np.setdiff1d(pool, train)
        folds.append(plans.Fold(f"seed {seed}", np.sort(train), val, np.sort(test)))
    return folds
