"""Generated H&E tissue: hematoxylin and eosin through Beer-Lambert, with every nucleus known.

`tissue` draws a field, `write_images` a folder of fields split by patient, `write_slide` a pyramidal
slide. The data of the demo, the tests and the benchmarks where no real data is given.
"""

from lemon_muse.synthetic.cells import CLASSES
from lemon_muse.synthetic.draw import Tissue, tissue
from lemon_muse.synthetic.files import write_images, write_slide

__all__ = ["CLASSES", "Tissue", "tissue", "write_images", "write_slide"]
