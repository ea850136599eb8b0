"""Real data: images of digits and clothes, English text, tables of patients. What is missing says how to bring it.

>>> found = image_set("digits")
>>> found.train_x.shape, found.test_x.shape, found.classes[:3]
(torch.Size([1437, 1, 8, 8]), torch.Size([360, 1, 8, 8]), ('0', '1', '2'))
"""

from neuropil.data.images import Images, digits, fashion_mnist, image_set
from neuropil.data.probes import Probe, probe
from neuropil.data.tables import Table, table
from neuropil.data.texts import Texts, text

__all__ = ["Images", "Probe", "Table", "Texts", "digits", "fashion_mnist", "image_set", "probe", "table", "text"]
