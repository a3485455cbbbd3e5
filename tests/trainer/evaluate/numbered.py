"""Pictures whose colours are their numbers, for processes that share them out."""

from PIL import Image

from lcm_core.errors import InputError


class Item:
    """What the trainer's data gives: a name, a caption, a picture that may be broken."""

    def __init__(self, number):
        self.key, self.caption, self.number = f"{number}.png", f"caption {number}", number

    def open(self):
        if self.number == 3:
            raise InputError("3.png is broken")
        return Image.new("RGB", (16, 16), (self.number * 10, 0, 0))


def means(pictures):
    """Features that show which picture they are of."""
    return pictures.float().flatten(2).mean(2)
