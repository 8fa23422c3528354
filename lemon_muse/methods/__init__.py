"""Self-supervised methods: one file each, named in one table.

A method is one module. The loop moves a batch, calls `method(batch, step)`, steps the optimiser,
logs the returned dict and saves; it knows no method by name.
"""

from typing import Any

from lemon_muse.methods.dinov2 import Dinov2
from lemon_muse.methods.dinov2_config import Dinov2Config
from lemon_muse.methods.joint import Joint
from lemon_muse.methods.joint_config import JointConfig
from lemon_muse.methods.moco_v3 import MoCoV3, MoCoV3Config
from lemon_muse.methods.muse import Muse, MuseConfig

METHODS: dict[str, tuple[Any, Any]] = {
    "dinov2": (Dinov2Config, Dinov2),
    "moco_v3": (MoCoV3Config, MoCoV3),
    "muse": (MuseConfig, Muse),
    "joint": (JointConfig, Joint),
}
