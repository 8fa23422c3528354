"""lemon_muse: pretraining of nucleus-level foundation models of H&E pathology."""

__version__ = "0.1.0"
