"""Write a pretrained encoder in the form that its users load; one file per target format."""

from lemon_muse.export import muse, timm

# format: function(encoder, folder, card) -> largest difference to the source's features
FORMATS = {"timm": timm.write, "muse": muse.write}
