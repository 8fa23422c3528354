"""Generated H&E tissue: hematoxylin and eosin through Beer-Lambert, with every nucleus known.

`tissue` draws a field, `write_images` a folder of fields split by patient, `write_slide` a
pyramidal slide: the data of the demo, the tests and the benchmarks where no real data is given.

The kinds of nuclei differ in size, outline, chromatin, nucleoli and surroundings; the stain, the
tissue's architecture and the optics change with the slide and the scanner, and the density of the
chromatin from nucleus to nucleus, so that colour does not give the kind away. Balanced accuracy
over the five kinds (40 px windows at 0.25 mpp, 24 slides on 6 scanners, 16 to train, 8 to test;
balanced logistic regression on standardised features; chance 0.20; slides that were not looked at
while the drawing was tuned):

    colour: mean and standard deviation of R, G, B          0.53
    colour: histogram, 16 bins a channel                    0.56
    colour of the window and of its central 12 px           0.65
    raw pixels: PCA, 64 components                          0.64
    orientation histograms (HOG) of the optical density     0.75
    outline, chromatin and radial profile of the density    0.89
"""

from lemon_muse.synthetic.cells import CLASSES
from lemon_muse.synthetic.draw import Tissue, tissue
from lemon_muse.synthetic.files import write_images, write_slide

__all__ = ["CLASSES", "Tissue", "tissue", "write_images", "write_slide"]
