r"""Natural-language descriptions of the units of a vision network.

For every unit of any layer of any network: the picture regions that drive it, and the sentence that is most
informative of them. Use the sentences to find units, to audit a network for what it should not look at, and to edit
it.

    MILAN(E) = argmax_d  log p(d | E) - lam log p(d)            E = {(x_j, m_j)}, j = 1..15

The exemplars E of a unit are the 15 pictures on which it peaks highest, each with the region where its map exceeds
the unit's 0.99 quantile (`exemplars`). p(d | E) is a captioner that looks at these regions through a frozen classifier
(`RegionEncoder`, `Captioner`), p(d) a language model of descriptions; their weighted pointwise mutual information with
lam = 0.2 prefers what is said of *these* regions to what is said of everything (`search`).

>>> import torch
>>> from torch import nn
>>> from neuropil.interpret import MILAN, exemplars
>>> torch.manual_seed(0) and None
>>> bright, dark = torch.rand(20, 5, 4) + 1, torch.rand(20, 5, 4) - 2  # vectors of 40 units' five regions each
>>> said = [["bright spots", "light spots"]] * 20 + [["dark lines"]] * 20
>>> milan = MILAN(hidden=16, embedding=8, epochs=30, lr=0.02, lm_epochs=20).fit(torch.cat([bright, dark]), said)
>>> [d.text for d in milan.describe(torch.stack([bright[0], dark[0]]))][1]
'dark lines'

With pictures, give an encoder, `MILAN(RegionEncoder(net, layers))`, and describe an `ExemplarSet`:
`milan.describe(exemplars(model, images, "layer3"))`. `scene_captioner()` is a ready one, of generated scenes.
Applications: `analyse`, `audit`, `edit_spurious`, `ablate`. Baselines: `netdissect`, `compositional`. Rerankers with a
CLIP: `candidates`. In an atlas: `description_columns`; from a shell: `neuropil describe`.

Source: Evan Hernandez, Sarah Schwettmann, David Bau, Teona Bagashvili, Antonio Torralba, Jacob Andreas, "Natural
Language Descriptions of Deep Visual Features", ICLR 2022, arXiv:2201.11114. Where the paper leaves a choice open, its
authors' code decides. Deviations: the running quantile keeps a histogram with a stated bound instead of a random
sketch; masks are computed from the kept maps when asked for, not stored at 224 x 224; the tokeniser is a regular
expression in place of spaCy's; fully connected layers have whole pictures as regions; units that never exceed their own
threshold are called dead and not described; the encoder's network is the caller's (the paper's ResNet-101 does
not travel inside a package). Properties of descriptions that need a tagger, a parser or word vectors take the
caller's.
"""

from neuropil.interpret.milan.baselines import Label, compositional, iou, netdissect, unit_masks
from neuropil.interpret.milan.candidates import HuggingFaceCLIP, PictureWords, choose, rerank
from neuropil.interpret.milan.captioner import Captioner
from neuropil.interpret.milan.columns import as_columns, described_columns, description_columns
from neuropil.interpret.milan.editing import (
    Audit,
    Deletion,
    Edit,
    ablate,
    accuracy,
    analyse,
    audit,
    edit_spurious,
    finetune_last,
)
from neuropil.interpret.milan.encoder import RegionEncoder, pool
from neuropil.interpret.milan.estimator import MILAN, Description
from neuropil.interpret.milan.exemplars import ExemplarSet, exemplars, regions
from neuropil.interpret.milan.language import LanguageModel, Vocabulary, bleu, rouge_l
from neuropil.interpret.milan.layer import UnknownLayer, tokens_to_grid
from neuropil.interpret.milan.scene_models import scene_captioner
from neuropil.interpret.milan.search import Found, beam_search, search

__all__ = [
    "MILAN",
    "Audit",
    "Captioner",
    "Deletion",
    "Description",
    "Edit",
    "ExemplarSet",
    "Found",
    "HuggingFaceCLIP",
    "Label",
    "LanguageModel",
    "PictureWords",
    "RegionEncoder",
    "UnknownLayer",
    "Vocabulary",
    "ablate",
    "accuracy",
    "analyse",
    "as_columns",
    "audit",
    "beam_search",
    "bleu",
    "choose",
    "compositional",
    "described_columns",
    "description_columns",
    "edit_spurious",
    "exemplars",
    "finetune_last",
    "iou",
    "netdissect",
    "pool",
    "regions",
    "rerank",
    "rouge_l",
    "scene_captioner",
    "search",
    "tokens_to_grid",
    "unit_masks",
]
