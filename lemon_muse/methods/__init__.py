"""Self-supervised methods: one file each, named in one table.

A method is one module. The loop moves a batch, calls `method(batch, step)`, steps the optimiser,
logs the returned dict and saves; it knows no method by name.
"""

from lemon_muse.methods.moco_v3 import MoCoV3, MoCoV3Config

METHODS = {"moco_v3": (MoCoV3Config, MoCoV3)}
