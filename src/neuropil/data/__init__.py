"""Real data: images of digits and clothes, English text. A set that is missing says how to bring it.

>>> images = digits()
>>> images.train_x.shape, images.test_x.shape, images.classes[:3]
(torch.Size([1437, 1, 8, 8]), torch.Size([360, 1, 8, 8]), ('0', '1', '2'))
"""

from neuropil.data.images import Images, digits, fashion_mnist
from neuropil.data.texts import Texts, text

__all__ = ["Images", "Texts", "digits", "fashion_mnist", "text"]
