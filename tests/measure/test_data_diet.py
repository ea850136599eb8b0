"""Data diets: the scores' closed forms, exact gradients against plain autograd, order, choosing, forgetting, noise."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from neuropil.data import digits, fashion_mnist
from neuropil.errors import MissingAsset, ModelError
from neuropil.measure.data_diet import (
    KINDS,
    Scores,
    el2n_scores,
    example_scores,
    grand_scores,
    keep,
    permute_labels,
    suspects,
    train_and_score,
)
from neuropil.measure.data_diet_landscape import barrier, kernel, kernel_velocity, path_errors
from neuropil.measure.forgetting import Forgetting
from neuropil.training import fit, supervised

CLASSES = 10


def mlp(inputs: int = 64) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 24), nn.ReLU(), nn.Linear(24, CLASSES))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(36, CLASSES)
    )


def specimen(seed: int = 0) -> tuple[Callable[..., Tensor], list[nn.Module], tuple[Tensor, Tensor]]:
    """EL2N of forty digits by two small convolutional networks with normalisation and dropout."""
    torch.manual_seed(seed)
    images = digits()
    return el2n_scores, [cnn(), cnn()], (images.train_x[:40], images.train_y[:40])


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor]:
    images = digits()
    return images.train_x, images.train_y


class Given(nn.Module):
    """A 'network' whose logits are its inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def of_logits(kind: str, logits: Tensor, y: Tensor) -> Tensor:
    return example_scores(Given(), (logits, y), kind)[0]


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- closed forms ----------------------------------------------------------------------------------


def test_el2n_of_uniform_right_and_wrong_predictions() -> None:
    logits = torch.zeros(3, 10, dtype=torch.float64)
    logits[1, 4], logits[2, 3] = 800.0, 800.0
    scores = of_logits("el2n", logits, torch.tensor([4, 4, 4]))
    torch.testing.assert_close(scores, torch.tensor([math.sqrt(0.9), 0.0, math.sqrt(2)], dtype=torch.float64))


def test_binary_el2n_is_root_two_times_the_missing_probability() -> None:
    logits = draw(0, 30, 2) * 3
    y = torch.arange(30) % 2
    missing = 1 - logits.softmax(1).gather(1, y[:, None])[:, 0]
    torch.testing.assert_close(of_logits("el2n", logits, y), math.sqrt(2) * missing)


@given(st.integers(0, 2**31), st.integers(2, 12), st.floats(0.1, 20), st.floats(-30, 30))
@settings(max_examples=30, deadline=None)
def test_relations_between_the_scores(seed: int, classes: int, scale: float, shift: float) -> None:
    logits = draw(seed, 20, classes) * scale
    y = torch.randint(classes, (20,), generator=torch.Generator().manual_seed(seed))
    p = logits.softmax(1)
    missing = 1 - p.gather(1, y[:, None])[:, 0]
    el2n = of_logits("el2n", logits, y)
    torch.testing.assert_close(of_logits("el1n", logits, y), 2 * missing, atol=1e-12, rtol=0)
    torch.testing.assert_close(of_logits("sum_margin", logits, y), 1 - classes * (1 - missing), atol=1e-11, rtol=0)
    others = p.scatter(1, y[:, None], -1.0).amax(1)
    torch.testing.assert_close(of_logits("max_margin", logits, y), others - (1 - missing), atol=1e-12, rtol=0)
    torch.testing.assert_close(of_logits("loss", logits, y), -logits.log_softmax(1).gather(1, y[:, None])[:, 0])
    assert bool((el2n <= math.sqrt(2) * missing + 1e-12).all())
    assert bool((el2n >= math.sqrt(classes / (classes - 1)) * missing - 1e-12).all())
    torch.testing.assert_close(of_logits("el2n", logits + shift, y), el2n, atol=1e-10, rtol=0)
    own_first = (-torch.arange(classes)).expand(20, -1).scatter(1, y[:, None], -classes).argsort(1)
    turned = logits.gather(1, own_first)  # the own class first, the others backwards
    torch.testing.assert_close(of_logits("el2n", turned, torch.zeros_like(y)), el2n, atol=1e-12, rtol=0)


def test_grand_of_a_linear_model_and_of_the_last_layer_alone(data: tuple[Tensor, Tensor]) -> None:
    x, y = data[0][:50].double().flatten(1), data[1][:50]
    model = nn.Linear(64, CLASSES).double()
    expected = el2n_scores(model, (x, y)) * (x.square().sum(1) + 1).sqrt()
    torch.testing.assert_close(grand_scores(model, (x, y)), expected)
    torch.testing.assert_close(grand_scores(model, (x, y), last_layer=True), expected)
    bare = nn.Linear(64, CLASSES, bias=False).double()
    expected = el2n_scores(bare, (x, y)) * x.norm(dim=1)
    torch.testing.assert_close(grand_scores(bare, (x, y)), expected)
    torch.testing.assert_close(grand_scores(bare, (x, y), last_layer=True), expected)


def test_grand_of_an_mlp_is_the_sum_over_layers_of_what_comes_in_and_what_comes_back(
    data: tuple[Tensor, Tensor],
) -> None:
    x, y = data[0][:40].double(), data[1][:40]
    model = mlp().double()
    layers = [m for m in model if isinstance(m, nn.Linear)]
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def note(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        inputs.append(given[0])
        outputs.append(out)

    hooks = [m.register_forward_hook(note) for m in layers]
    loss = nn.functional.cross_entropy(model(x), y, reduction="sum")
    for hook in hooks:
        hook.remove()
    back = torch.autograd.grad(loss, outputs)
    squares = [d.square().sum(1) * (a.detach().square().sum(1) + 1) for d, a in zip(back, inputs, strict=True)]
    torch.testing.assert_close(grand_scores(model, (x, y)), sum(squares).sqrt(), rtol=1e-5, atol=0)
    last = grand_scores(model, (x, y), last_layer=True)
    torch.testing.assert_close(last, squares[-1].sqrt(), rtol=1e-8, atol=0)


def by_autograd(model: nn.Module, x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """One example, one backward pass, at a time."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    norms = []
    for i in range(len(y)):
        gradients = torch.autograd.grad(loss(model(x[i : i + 1]), y[i : i + 1]), parameters)
        norms.append(torch.cat([g.flatten() for g in gradients]).double().norm())
    return torch.stack(norms)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("build", [mlp, cnn])
def test_grand_equals_one_backward_pass_an_example(
    build: Callable[[], nn.Module], frozen: bool, data: tuple[Tensor, Tensor]
) -> None:
    x, y = data[0][:30], data[1][:30]
    model = build()
    model(x)  # running statistics other than the initial ones
    next(model.parameters()).requires_grad_(not frozen)
    scores = grand_scores(model, (x, y), batch_size=7)
    torch.testing.assert_close(scores, by_autograd(model.eval(), x, y, nn.functional.cross_entropy), rtol=1e-5, atol=0)


def test_several_labels_an_example_use_the_sigmoid(data: tuple[Tensor, Tensor]) -> None:
    x = data[0][:20]
    y = (draw(0, 20, CLASSES) > 0).float()
    model = mlp()
    p = model(x).double().sigmoid().detach()
    torch.testing.assert_close(el2n_scores(model, (x, y)), (p - y).norm(dim=1))

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(logits, y, reduction="sum")

    torch.testing.assert_close(grand_scores(model, (x, y)), by_autograd(model, x, y, loss), rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="one integer label"):
        example_scores(model, (x, y), "max_margin")


def test_the_centred_score_subtracts_the_class_balanced_mean(data: tuple[Tensor, Tensor]) -> None:
    x, y = data[0][:30].double().flatten(1), data[1][:30] % 3  # unbalanced classes
    model = nn.Linear(64, 3).double()
    # The gradient of the summed logits is (x, 1) for each class.
    mean = torch.stack([x[y == c].mean(0) for c in range(3)]).mean(0)
    expected = math.sqrt(3) * (x - mean).norm(dim=1)
    torch.testing.assert_close(example_scores(model, (x, y), "centred", batch_size=8)[0], expected)
    twice = (torch.cat([x, x]), torch.cat([y, y]))  # copies weigh as much as they are many
    torch.testing.assert_close(example_scores(model, twice, "centred")[0], torch.cat([expected, expected]))


# --- order, batches, runs --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_the_data_never_changes_a_score(kind: str, data: tuple[Tensor, Tensor]) -> None:
    x, y = data[0][:90], data[1][:90]
    x, y = torch.cat([x, x[:5]]), torch.cat([y, y[:5]])  # some examples stand twice
    models = [cnn(), cnn()]
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(1))
    scores = example_scores(models, (x, y), kind, batch_size=16)
    assert torch.equal(example_scores(models, (x[order], y[order]), kind, batch_size=16), scores[:, order])
    assert torch.equal(scores[:, :5], scores[:, -5:])
    assert scores.std() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_batch_size_changes_nothing_beyond_rounding(kind: str, data: tuple[Tensor, Tensor]) -> None:
    pair = (data[0][:50].double(), data[1][:50])
    model = cnn().double()
    scores = [example_scores(model, pair, kind, batch_size=size) for size in (1, 7, 50, 1000)]
    for other in scores[1:]:
        torch.testing.assert_close(other, scores[0], rtol=1e-12, atol=1e-14)


def test_trained_networks_do_not_depend_on_the_order_either(data: tuple[Tensor, Tensor]) -> None:
    x, y = torch.cat([data[0][:180], data[0][:20]]), torch.cat([data[1][:180], data[1][:20]])  # twenty stand twice
    order = torch.randperm(200, generator=torch.Generator().manual_seed(2))
    for kind in ("el2n", "forgetting"):
        scores = train_and_score(mlp, (x, y), kind, n_runs=2, epochs=3)
        shuffled = train_and_score(mlp, (x[order], y[order]), kind, n_runs=2, epochs=3)
        assert torch.equal(shuffled.per_run, scores.per_run[:, order])
        assert torch.equal(scores.per_run[:, :20], scores.per_run[:, 180:])
        assert not torch.equal(scores.per_run[0], scores.per_run[1])


def test_the_mean_over_runs_is_a_mean_of_norms(data: tuple[Tensor, Tensor]) -> None:
    pair = (data[0][:20], data[1][:20])
    one, two = mlp(), mlp()
    apart = [el2n_scores(m, pair) for m in (one, two)]
    torch.testing.assert_close(el2n_scores([one, two], pair), (apart[0] + apart[1]) / 2)
    assert torch.equal(el2n_scores(nn.ModuleList([one, one]), pair), apart[0])


def test_a_run_is_the_same_in_a_group_and_alone(data: tuple[Tensor, Tensor]) -> None:
    pair = (data[0][:100], data[1][:100])
    state = torch.get_rng_state()
    group = train_and_score(mlp, pair, n_runs=3, epochs=1, seed=5)
    assert torch.equal(state, torch.get_rng_state())
    alone = train_and_score(mlp, pair, n_runs=1, epochs=1, seed=7)
    assert torch.equal(group.per_run[2], alone.per_run[0])
    assert group.settings["seeds"] == [5, 6, 7]


def test_the_model_is_left_as_it_was(data: tuple[Tensor, Tensor]) -> None:
    pair = (data[0][:20], data[1][:20])
    model = cnn().train()
    model[1].eval()  # a part that the user froze
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for kind in KINDS:
        example_scores(model, pair, kind)
    kernel(model, pair[0][:4])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model] == [True, False, True, True, True, True]
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert not any(m._forward_hooks for m in model.modules())


class Bag(nn.Module):
    """A text classifier in the manner of transformers: keyword inputs, an output with `.logits`."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(30, 8)
        self.classifier = nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        mask = attention_mask[..., None]
        mean = (self.words(input_ids) * mask).sum(1) / mask.sum(1)

        class Output:
            logits = self.classifier(mean)

        return Output()


def test_text_classifiers_with_keyword_inputs() -> None:
    ids = torch.randint(30, (12, 6), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(6) < torch.arange(1, 13)[:, None]).float()
    inputs, y = {"input_ids": ids, "attention_mask": mask}, torch.arange(12) % 3
    model = Bag()
    expected = []
    for i in range(12):
        loss = nn.functional.cross_entropy(model(ids[i : i + 1], mask[i : i + 1]).logits, y[i : i + 1])
        expected.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).norm())
    torch.testing.assert_close(grand_scores(model, (inputs, y)), torch.stack(expected).double(), rtol=1e-5, atol=0)
    assert grand_scores(model, (inputs, y), last_layer=True).shape == (12,)
    assert train_and_score(Bag, (inputs, y), n_runs=1, epochs=1).mean.shape == (12,)


def test_a_data_set_is_scored_like_its_tensors(data: tuple[Tensor, Tensor]) -> None:
    pair = (data[0][:33], data[1][:33])
    model = mlp()
    assert torch.equal(el2n_scores(model, TensorDataset(*pair)), el2n_scores(model, pair))


# --- bad input -------------------------------------------------------------------------------------


class Centred(nn.Module):
    """Mixes the examples of a batch in a way of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(0))[:, :CLASSES] + x[:, CLASSES : 2 * CLASSES]


class Augmented(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        return torch.rand(1, 8, 8), place


def test_bad_data_are_refused_with_what_was_expected(data: tuple[Tensor, Tensor]) -> None:
    x, y = data[0][:8], data[1][:8]
    model = mlp()
    with pytest.raises(ValueError, match="augments or shuffles"):
        el2n_scores(model, Augmented())
    with pytest.raises(ValueError, match="pass the loader's"):
        el2n_scores(model, DataLoader(TensorDataset(x, y), shuffle=True))
    for labels, said in ((y + 10, "expected 0 to 9"), (y - 100, "-100, say"), (y.float(), "expected integers")):
        with pytest.raises(ValueError, match=said):
            el2n_scores(model, (x, labels))
        with pytest.raises(ValueError, match=said):
            train_and_score(mlp, (x, labels), n_runs=1, epochs=1)
    with pytest.raises(ValueError, match=r"\[7, 8\] examples"):
        el2n_scores(model, (x, y[:7]))
    with pytest.raises(ValueError, match="expected 1 or more"):
        el2n_scores(model, (x, y), batch_size=0)
    with pytest.raises(ValueError, match="expected one of el2n"):
        example_scores(model, (x, y), "el3n")
    with pytest.raises(ValueError, match="no model"):
        el2n_scores([], (x, y))
    holes = x.clone()
    holes[3] = torch.nan
    with pytest.raises(ValueError, match="example 3 has score nan"):
        el2n_scores(model, (holes, y), batch_size=1)


def test_bad_models_are_refused_with_what_was_expected(data: tuple[Tensor, Tensor]) -> None:
    x, y = data[0][:8], data[1][:8]
    mixing = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64, track_running_stats=False), nn.Linear(64, 10))
    with pytest.raises(ModelError, match="1 is a BatchNorm without running"):
        grand_scores(mixing, (x, y))
    with pytest.raises(ModelError, match="or is random"):
        el2n_scores(Centred(), (x.flatten(1), y))
    with pytest.raises(ModelError, match="logits \\[examples, classes\\]"):
        el2n_scores(nn.Conv2d(1, 3, 3), (x, y))
    with pytest.raises(ModelError, match="no trainable parameter"):
        grand_scores(mlp().requires_grad_(False), (x, y))
    with pytest.raises(ModelError, match="no last-layer form"):
        grand_scores(nn.Sequential(mlp(), nn.Tanh()), (x, y), last_layer=True)
    broken = mlp()
    nn.init.constant_(broken[3].bias, torch.inf)
    with pytest.raises(ModelError, match="not finite"):
        el2n_scores(broken, (x, y))
    shared = mlp()
    with pytest.raises(ValueError, match="same network twice"):
        train_and_score(lambda: shared, (x, y), n_runs=2, epochs=1)
    with pytest.warns(UserWarning, match=r"2303\.14753"):
        train_and_score(mlp, (x, y), "grand", n_runs=1, epochs=0)
    with pytest.raises(ValueError, match="epochs to count forgetting"):
        train_and_score(mlp, (x, y), "forgetting", n_runs=1, epochs=0)


# --- keeping scores, choosing by them --------------------------------------------------------------


def test_scores_survive_a_file_and_are_written_whole(tmp_path: Path, data: tuple[Tensor, Tensor]) -> None:
    import pyarrow.parquet as pq

    pair = (data[0][:30], data[1][:30])
    scores = train_and_score(mlp, pair, n_runs=2, epochs=1)
    path = scores.save(tmp_path / "new folder" / "scores.parquet")
    again = Scores.load(path)
    assert torch.equal(again.per_run, scores.per_run)
    assert torch.equal(again.labels, pair[1])
    assert again.settings == scores.settings == {"kind": "el2n", "epochs": 1, "seeds": [0, 1]}
    table = pq.read_table(path)
    assert table.column_names == ["index", "label", "score", "run_0", "run_1"]
    assert table["index"].to_pylist() == list(range(30))
    assert table["score"].to_pylist() == scores.mean.tolist()
    assert [p.name for p in path.parent.iterdir()] == ["scores.parquet"]  # nothing temporary is left
    infinite = Scores(torch.tensor([[1.0, torch.inf]], dtype=torch.float64), torch.tensor([0, 1]))
    assert Scores.load(infinite.save(path)).mean.tolist() == [1.0, torch.inf]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = Scores(torch.rand(1, 3, dtype=torch.float64), torch.tensor([0, 1, 0]))
    path = scores.save(tmp_path / "scores.parquet")
    before = path.read_bytes()

    def full(self: Path, content: bytes) -> int:
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        Scores(scores.per_run * 2, scores.labels).save(path)
    assert path.read_bytes() == before


def test_files_that_are_no_scores_are_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    scores = Scores(torch.rand(1, 3, dtype=torch.float64), torch.tensor([0, 1, 0]))
    path = scores.save(tmp_path / "scores.parquet")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="no readable Parquet"):
        Scores.load(path)
    pq.write_table(pa.table({"x": [1]}), path)
    with pytest.raises(ValueError, match="no scores"):
        Scores.load(path)
    with pytest.raises(FileNotFoundError):
        Scores.load(tmp_path / "none.parquet")


@given(st.lists(st.integers(0, 4), min_size=2, max_size=30), st.data())
@settings(max_examples=60, deadline=None)
def test_windows_partition_the_examples(values: list[int], choice: st.DataObject) -> None:
    scores = torch.tensor(values, dtype=torch.float64)  # many ties
    n = len(values)
    k = choice.draw(st.integers(1, n - 1))
    hard, easy = keep(scores, k), keep(scores, n - k, offset=0)
    assert sorted([*hard.tolist(), *easy.tolist()]) == list(range(n))
    assert scores[hard].min() >= scores[easy].max()
    ascending = sorted(range(n), key=lambda i: (values[i], i))
    begin = choice.draw(st.integers(0, n - k))
    assert keep(scores, k, offset=begin).tolist() == sorted(ascending[begin : begin + k])
    assert torch.equal(keep(scores, k, labels=scores.long(), floor=0.0), hard)
    assert suspects(scores, k).tolist() == ascending[::-1][:k]


def test_shares_and_class_floors() -> None:
    scores = torch.arange(100.0)
    labels = (torch.arange(100) >= 60).long()  # 60 easy ones of class 0, 40 hard ones of class 1
    assert torch.equal(keep(scores, 0.3), torch.arange(70, 100))
    assert torch.equal(keep(scores, 0.3, offset=0.5), torch.arange(50, 80))
    for floor, easy in ((1.0, 18), (0.5, 9), (0.0, 0)):
        kept = keep(scores, 30, labels=labels, floor=floor)
        assert len(kept) == 30
        assert int((labels[kept] == 0).sum()) == easy
        assert torch.equal(kept[labels[kept] == 0], torch.arange(60 - easy, 60))
    kept = keep(scores, 30, offset=50, labels=labels)  # the twenty hardest are out of question
    assert kept.tolist() == [*range(42, 60), *range(68, 80)]


def test_impossible_choices_are_refused() -> None:
    scores = torch.rand(10)
    for count, options in ((11, {}), (0, {}), (1.5, {}), (5, {"offset": 6}), (5, {"floor": 2.0})):
        with pytest.raises(ValueError, match=r"keep|expected"):
            keep(scores, count, **options)
    scores[2] = torch.nan
    with pytest.raises(ValueError, match="1 of 10 scores are NaN"):
        keep(scores, 5)


def test_label_noise_permutes_a_share_of_the_labels() -> None:
    labels = torch.arange(1000) % 10
    noisy, changed = permute_labels(labels, 0.2, seed=3)
    assert torch.equal(noisy.bincount(), labels.bincount())  # a permutation
    assert torch.equal(changed, noisy != labels)
    assert 150 < int(changed.sum()) <= 200  # a tenth of those chosen stay right by chance
    assert torch.equal(permute_labels(labels, 0.2, seed=3)[0], noisy)
    assert not permute_labels(labels, 0.0)[1].any()


# --- forgetting ------------------------------------------------------------------------------------


def test_forgetting_of_hand_made_sequences() -> None:
    sequences = torch.tensor([[0, 1, 0, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [0, 1, 1, 1, 1]]).bool()
    tracker = Forgetting(4)
    for step in range(5):
        places = torch.randperm(4, generator=torch.Generator().manual_seed(step))
        tracker.record(places, sequences[places, step])
    assert tracker.scores().tolist() == [2.0, 0.0, torch.inf, 0.0]


def test_a_resumed_tracker_counts_on(tmp_path: Path) -> None:
    draws = torch.Generator().manual_seed(0)
    minibatches = [(torch.randperm(50, generator=draws)[:20], torch.rand(20, generator=draws) > 0.5) for _ in range(40)]
    whole, half, resumed = (Forgetting(50) for _ in range(3))
    for number, minibatch in enumerate(minibatches):
        whole.record(*minibatch)
        if number < 15:
            half.record(*minibatch)
    torch.save(half.state_dict(), tmp_path / "tracker.pt")
    resumed.load_state_dict(torch.load(tmp_path / "tracker.pt", weights_only=True))
    for minibatch in minibatches[15:]:
        resumed.record(*minibatch)
    assert torch.equal(resumed.scores(), whole.scores())
    assert not torch.equal(half.events, whole.events)  # the first part alone is not the whole
    with pytest.raises(ValueError, match="tracker of 7"):
        Forgetting(7).load_state_dict(whole.state_dict())


def test_forgetting_looks_only_at_the_minibatch() -> None:
    tracker = Forgetting(2)
    tracker.record(torch.tensor([0]), torch.tensor([True]))
    with pytest.raises(ValueError, match="1 of 2 examples"):
        tracker.scores()
    tracker.record(torch.tensor([1]), torch.tensor([True]))
    assert tracker.scores().tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="expected 0 to 1"):
        tracker.record(torch.tensor([2]), torch.tensor([True]))


# --- loss surface and kernel -----------------------------------------------------------------------


def test_barrier_of_equal_and_of_trained_children(data: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(0)
    first, second = mlp(), mlp()
    assert barrier(path_errors(first, first, data)) == 0.0
    for seed, net in enumerate((first, second)):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        fit(net, data, supervised(nn.functional.cross_entropy), optimizer, epochs=8, seed=seed, progress=False)
    errors = path_errors(first, second, data, points=5)
    for end, net in ((0, first), (-1, second)):
        assert torch.equal(errors[end], (net(data[0]).argmax(1) != data[1]).double())
    middle = mlp()
    middle.load_state_dict({k: (v + second.state_dict()[k]) / 2 for k, v in first.state_dict().items()})
    torch.testing.assert_close(
        errors[2].mean(), (middle(data[0]).argmax(1) != data[1]).double().mean(), atol=2e-3, rtol=0
    )
    assert barrier(errors) > 0.1  # networks that never shared a basin
    scores = el2n_scores([first, second], data)
    easy, hard = keep(scores, 0.3, offset=0), keep(scores, 0.3)
    assert barrier(errors[:, easy]) < barrier(errors[:, hard])
    with pytest.raises(ValueError, match="two children"):
        path_errors(first, cnn(), data)


def test_kernel_is_the_gram_matrix_of_logit_gradients(data: tuple[Tensor, Tensor]) -> None:
    x = data[0][:4].double()
    model = mlp().double()
    rows = []
    for i in range(4):
        for k in range(CLASSES):
            gradients = torch.autograd.grad(model(x[i : i + 1])[0, k], list(model.parameters()))
            rows.append(torch.cat([g.flatten() for g in gradients]))
    gram = torch.stack(rows) @ torch.stack(rows).T
    found = kernel(model, x)
    torch.testing.assert_close(found, gram)
    assert kernel_velocity(found, 3 * found) == pytest.approx(0, abs=1e-12)
    other = kernel(mlp().double(), x)
    assert 0.01 < kernel_velocity(found, other) < 1
    # GraNd is the norm that the kernel gives to the error vector.
    y = data[1][:4]
    error = model(x).softmax(1).detach() - nn.functional.one_hot(y, CLASSES)
    blocks = found.view(4, CLASSES, 4, CLASSES)[torch.arange(4), :, torch.arange(4)]
    torch.testing.assert_close(grand_scores(model, (x, y)), torch.einsum("ij,ijk,ik->i", error, blocks, error).sqrt())


# --- real data -------------------------------------------------------------------------------------


def small_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=4, padding=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 49, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


def low_rate(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)


def test_wrong_labels_of_clothes_are_found_early() -> None:
    try:
        images = fashion_mnist()
    except MissingAsset:
        pytest.skip("Fashion-MNIST is not installed")
    noisy, changed = permute_labels(images.train_y[:3000], 0.1)
    scores = train_and_score(small_cnn, (images.train_x[:3000], noisy), n_runs=2, epochs=4, optimizer=low_rate)
    assert roc_auc_score(changed, scores.mean) > 0.93
    assert changed[suspects(scores.mean, int(changed.sum()))].double().mean() > 0.6


def test_el2n_agrees_with_grand_and_with_forgetting_on_digits(data: tuple[Tensor, Tensor]) -> None:
    from scipy.stats import spearmanr

    options: dict[str, Any] = {"n_runs": 2, "epochs": 6, "optimizer": low_rate}
    el2n, grand = (train_and_score(mlp, data, kind, **options).mean for kind in ("el2n", "grand"))
    assert spearmanr(el2n, grand).statistic > 0.95
    forgotten = train_and_score(mlp, data, "forgetting", **options).mean
    assert spearmanr(el2n, forgotten).statistic > 0.5
