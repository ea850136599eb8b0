"""Exemplars: planted units, the running sketch against the whole data, every kind of layer, resuming, bad input."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from neuropil.errors import ModelError
from neuropil.interpret.milan import ExemplarSet, RegionEncoder, UnknownLayer, exemplars, regions, tokens_to_grid
from neuropil.interpret.milan.running import RunningQuantile, RunningTopK
from neuropil.neurons import find_sites


def images(count: int = 200, side: int = 8, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def red_copier() -> nn.Sequential:
    """A layer whose one unit is the red channel."""
    conv = nn.Conv2d(3, 1, 1, bias=False)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([1.0, 0, 0]).reshape(1, 3, 1, 1))
    return nn.Sequential(conv)


def small_net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(96, 5))


# --- the planted unit ------------------------------------------------------------------------------


def test_a_unit_that_copies_red_has_the_reddest_images_and_their_red_regions() -> None:
    probe = images()
    found = exemplars(red_copier(), probe, "0", batch_size=32)
    red = probe[:, 0]
    best = red.flatten(1).amax(1).argsort(descending=True, stable=True)[:15]
    assert found.image_ids[0].tolist() == best.tolist()
    torch.testing.assert_close(found.values[0], red.flatten(1).amax(1)[best])
    threshold = torch.quantile(red.flatten(), 0.99)
    assert abs(float(found.threshold[0] - threshold)) < 1e-3
    assert torch.equal(found.masks()[0, :, 0], red[best] > found.threshold[0])  # no resampling: exactly
    assert torch.equal(found.pictures()[0], (probe[best] * 255).round().to(torch.uint8))
    assert not found.dead.any()


def test_equal_images_rank_by_their_place() -> None:
    probe = torch.zeros(9, 3, 2, 2)
    probe[[2, 4, 7], 0, 0, 0] = 0.5
    found = exemplars(red_copier(), probe, "0", k=5, batch_size=2)
    assert found.image_ids[0].tolist() == [2, 4, 7, 0, 1]


def test_one_percent_of_all_places_exceeds_the_threshold() -> None:
    net, probe = small_net(), images(100)
    found = exemplars(net, probe, "0", batch_size=7)
    maps = net[0](probe)
    share = (maps > found.threshold[None, :, None, None]).float().mean((0, 2, 3))
    torch.testing.assert_close(share, torch.full((6,), 0.01), atol=1 / maps[:, 0].numel(), rtol=0)


def test_masks_are_the_bilinear_map_over_the_threshold() -> None:
    net, probe = small_net(), images(40)
    found = exemplars(net, probe, "2", k=3)
    maps = nn.functional.interpolate(net[:3](probe), (20, 28), mode="bilinear", align_corners=False)
    for unit in range(6):
        expected = maps[found.image_ids[unit], unit] > found.threshold[unit]
        assert torch.equal(found.masks((20, 28))[unit, :, 0], expected)
    assert found.masks().shape == (6, 3, 1, 8, 8)


# --- the running sketch ----------------------------------------------------------------------------


@given(st.integers(0, 2**31), st.sampled_from(["uniform", "relu", "wild", "drift"]), st.integers(1, 700))
@settings(max_examples=25, deadline=None)
def test_the_running_quantile_is_within_its_stated_error(seed: int, shape: str, part: int) -> None:
    values = torch.randn(3, 5000, generator=torch.Generator().manual_seed(seed))
    if shape == "uniform":
        values = torch.special.ndtr(values)
    elif shape == "relu":
        values = values.relu()
    elif shape == "wild":
        values = values.sinh() ** 3
    else:
        values = values + torch.arange(5000) * 0.01 - 20
    stream = RunningQuantile(3, capacity=256, bins=512)
    for some in values.split(part, dim=1):
        stream.add(some)
    assert not stream.exact
    assert int(stream.counts.sum()) == values.numel()
    for q in (0.5, 0.99):
        truth = torch.quantile(values, q, dim=1)
        error = stream.error(q)
        scale = values.abs().amax(1) * 1e-6
        assert ((stream.quantile(q) - truth).abs() <= error + scale).all()
    assert (stream.width <= 4 * (values.amax(1) - values.amin(1)) / 512 + 1e-12).all()


def test_the_quantile_is_exact_while_it_fits() -> None:
    values = torch.randn(4, 999, generator=torch.Generator().manual_seed(1))
    stream = RunningQuantile(4)
    for part in values.split(100, dim=1):
        stream.add(part)
    for q in (0.001, 0.37, 0.99):
        torch.testing.assert_close(stream.quantile(q), torch.quantile(values, q, dim=1))
        assert not stream.error(q).any()


def test_a_row_that_was_constant_may_come_to_life() -> None:
    stream = RunningQuantile(2, capacity=4, bins=64)
    for value in (0.0, 0.0, 1e6, -1e6):
        stream.add(torch.full((2, 8), value))
    assert stream.counts.sum(1).tolist() == [32, 32]
    assert ((stream.quantile(0.5) - 0).abs() <= stream.error(0.5)).all()


def test_memory_does_not_grow_with_the_probe() -> None:
    sizes = []
    for count in (400, 4000):
        stream, top = RunningQuantile(2, capacity=1000, bins=128), RunningTopK(5)
        for part in images(count, 4)[:, :2].split(50):
            stream.add(part.transpose(0, 1).flatten(1))
            top.add(part)
        held = [*stream.state_dict().values(), *top.state_dict().values()]
        sizes.append(sum(x.numel() for x in held if isinstance(x, Tensor)))
    assert sizes[0] == sizes[1]


def test_pictures_are_stored_once_and_only_those_in_use() -> None:
    found = exemplars(small_net(), images(300), "0", k=4)
    assert found.stored_ids.tolist() == sorted(set(found.image_ids.flatten().tolist()))
    assert len(found.stored) == len(found.stored_ids) <= 24


@pytest.mark.parametrize("size", [1, 7, 64, 500])
def test_the_batch_size_changes_nothing(size: int) -> None:
    net, probe = small_net(), images(64)
    whole, parts = (exemplars(net, probe, "2", batch_size=b, capacity=300, bins=256) for b in (64, size))
    assert torch.equal(whole.image_ids, parts.image_ids)
    torch.testing.assert_close(whole.values, parts.values)
    error = torch.maximum(whole.threshold_error, parts.threshold_error)
    assert ((whole.threshold - parts.threshold).abs() <= error + 1e-6).all()


# --- kinds of layers -------------------------------------------------------------------------------


def test_fully_connected_units_have_whole_images() -> None:
    net, probe = small_net(), images(50)
    found = exemplars(net, probe, "4")
    assert found.flat
    assert found.masks().all()
    assert torch.equal(found.image_ids, net(probe).argsort(dim=0, descending=True, stable=True)[:15].T)


def test_a_site_gives_the_activation_after_the_nonlinearity() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    probe = images(40)
    by_site, by_name = exemplars(net, probe, find_sites(net)[0]), exemplars(net, probe, "1")
    assert torch.equal(by_site.image_ids, by_name.image_ids)
    assert torch.equal(by_site.threshold, by_name.threshold)
    assert len(by_site) == 4


def test_a_vit_loses_its_first_token_and_keeps_its_patches_in_place() -> None:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, image_size=16, patch_size=4
    )
    net, probe = ViTModel(config, add_pooling_layer=False).eval(), images(20, 16)
    [first, *_] = find_sites(net)
    found = exemplars(net, probe, first, k=3, keep=False)
    assert found.maps.shape == (12, 3, 4, 4)
    from neuropil.neurons import capture

    with torch.no_grad(), capture(net, [first]) as seen:
        net(probe)
    h = seen[first.name][:, 1:]  # [images, patches, units]
    for unit in range(12):
        torch.testing.assert_close(found.maps[unit], h[found.image_ids[unit], :, unit].unflatten(1, (4, 4)))
    again = exemplars(net, probe, first, k=3, keep=False, reshape=tokens_to_grid(1, (4, 4)))
    assert torch.equal(again.image_ids, found.image_ids)


def test_tokens_that_are_no_square_ask_for_a_reshape() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.flatten(2).transpose(1, 2)[:, :12])

    with pytest.raises(ModelError, match=r"tokens_to_grid\(prefix"):
        exemplars(Tokens(), images(4), "inner")
    found = exemplars(Tokens(), images(4), "inner", k=2, reshape=tokens_to_grid(0, (3, 4)))
    assert found.maps.shape == (3, 2, 3, 4)
    with pytest.raises(ValueError, match="no grid of"):
        exemplars(Tokens(), images(4), "inner", reshape=tokens_to_grid(2))


def test_a_generator_is_probed_by_codes_and_shows_what_it_makes() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Unflatten(1, (4, 2, 2)), nn.ConvTranspose2d(4, 5, 2, 2), nn.ReLU(), nn.Conv2d(5, 3, 1))
    net.append(nn.Sigmoid())
    codes = torch.randn(30, 16)
    found = exemplars(net, codes, "2", k=4, generative=True)
    made = net(codes)
    assert found.pictures().shape == (5, 4, 3, 4, 4)
    assert torch.equal(found.pictures()[0], (made[found.image_ids[0]] * 255).round().to(torch.uint8))
    inner = net[:3](codes)
    assert torch.equal(found.image_ids[2], inner[:, 2].flatten(1).amax(1).argsort(descending=True, stable=True)[:4])


def test_silent_and_constant_units_are_dead() -> None:
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].weight[2, 1] = 1.0
        net[0].bias.copy_(torch.tensor([-1.0, 0.5, 0.0]))
    found = exemplars(net, images(30), "1")
    assert found.dead.tolist() == [True, True, False]
    assert not found.masks()[:2].any()
    assert found.masks()[2].flatten(1).any(1).all()


# --- forms of the probe, of the answer -------------------------------------------------------------


def test_tensors_data_sets_and_iterables_give_the_same() -> None:
    net, probe = small_net(), images(50)
    pairs = torch.utils.data.TensorDataset(probe, torch.arange(50))
    found = [exemplars(net, p, "0", batch_size=8) for p in (probe, pairs, iter(probe.split(8)), list(probe.split(8)))]
    for other in found[1:]:
        assert torch.equal(other.image_ids, found[0].image_ids)
        assert torch.equal(other.threshold, found[0].threshold)


def test_one_pass_for_several_layers_gives_what_a_pass_for_each_does() -> None:
    net, shown = small_net(), images(90)
    layers = [*find_sites(net), "0"]
    calls: list[int] = []
    net.register_forward_pre_hook(lambda *_: calls.append(1))
    together = regions(net, shown, layers, k=4)
    assert len(calls) == 3  # batches of 32
    for layer, found in zip(layers, together, strict=True):
        alone = exemplars(net, shown, layer, k=4)
        assert found.layer == alone.layer
        assert not len(found.stored)
        for name in ("image_ids", "values", "maps", "threshold"):
            assert torch.equal(getattr(found, name), getattr(alone, name))


def test_saved_and_loaded_and_taken(tmp_path: Path) -> None:
    found = exemplars(small_net(), images(40), "2", units=[4, 1])
    again = ExemplarSet.load(found.save(tmp_path / "set.safetensors"))
    for name in ("layer", "quantile", "seen", "size", "flat"):
        assert getattr(again, name) == getattr(found, name)
    assert torch.equal(again.pictures(), found.pictures())
    assert torch.equal(again.masks(), found.masks())
    assert again.take([1]).units.tolist() == [1]
    every = exemplars(small_net(), images(40), "2")
    assert torch.equal(every.image_ids[[4, 1]], found.image_ids)
    (tmp_path / "bad").write_text("no")
    with pytest.raises(ModelError, match="holds no exemplars"):
        ExemplarSet.load(tmp_path / "bad")


def test_the_compact_form_covers_the_region() -> None:
    found = exemplars(small_net()[:3], images(60, 28), "0")
    small = found.compact(14)
    cells = found.masks()[:, :, 0].unflatten(2, (14, 2)).unflatten(4, (14, 2)).float().mean((3, 5))
    assert torch.equal(small["masks"] > 0, cells > 0)
    assert torch.equal(small["masks"] == 255, cells == 1)
    assert {name: len(part) for name, part in small.items()} == dict.fromkeys(small, 6)


def test_a_grid_is_dim_outside_the_region() -> None:
    found = exemplars(red_copier(), images(), "0", k=4)
    grid = found.grid(0, columns=3)
    assert grid.shape == (3, 16, 24)
    picture, mask = found.pictures()[0, 0], found.masks()[0, 0]
    expected = torch.where(mask, picture.float(), picture.float() * 0.25).to(torch.uint8)
    assert torch.equal(grid[:, :8, :8], expected)
    assert not grid[:, 8:, 8:].any()


@pytest.mark.parametrize("capacity", [10**6, 300])
def test_a_run_that_was_stopped_goes_on_to_the_same(tmp_path: Path, capacity: int) -> None:
    class Stop(Exception):  # noqa: N818
        pass

    net, probe, path = small_net(), images(100), tmp_path / "run"

    def half() -> object:
        for number, part in enumerate(probe.split(10)):
            if number == 6:
                raise Stop
            yield part

    whole = exemplars(net, probe, "0", batch_size=10, capacity=capacity)
    with pytest.raises(Stop):
        exemplars(net, half(), "0", checkpoint=path, save_every=4, capacity=capacity)
    assert path.exists()
    ran: list[int] = []
    count = net.register_forward_hook(lambda _, args, __: ran.append(len(args[0])))
    resumed = exemplars(net, probe, "0", batch_size=10, checkpoint=path, capacity=capacity)
    count.remove()
    assert sum(ran) == 60  # four batches were kept
    for name in ("image_ids", "values", "maps", "threshold", "threshold_error", "stored_ids", "stored"):
        assert torch.equal(getattr(resumed, name), getattr(whole, name))
    assert not path.exists()


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    net, path = small_net(), tmp_path / "run"

    def endless() -> object:
        yield images(10)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        exemplars(net, endless(), "0", checkpoint=path, save_every=1)
    with pytest.raises(ValueError, match="other settings"):
        exemplars(net, images(20), "0", k=3, checkpoint=path)


# --- the model stays, bad input is refused ---------------------------------------------------------


def test_the_model_is_as_it_was() -> None:
    net = small_net().train()
    net[1].eval()
    modes = [m.training for m in net.modules()]
    exemplars(net, images(5), "0")
    assert [m.training for m in net.modules()] == modes
    with pytest.raises(RuntimeError):
        exemplars(net, images(5, side=12), "0")  # the last layer does not fit
    assert [m.training for m in net.modules()] == modes
    assert not any(m._forward_hooks for m in net.modules())


def test_bad_arguments_say_how_to_mend_them() -> None:
    net, probe = small_net(), images(5)
    with pytest.raises(ValueError, match="k is 0"):
        exemplars(net, probe, "0", k=0)
    for q in (0.0, 1.0):
        with pytest.raises(ValueError, match="quantile is"):
            exemplars(net, probe, "0", quantile=q)
    with pytest.raises(ValueError, match="units is empty"):
        exemplars(net, probe, "0", units=[])
    with pytest.raises(ValueError, match="units 0 to 5"):
        exemplars(net, probe, "0", units=[6])
    with pytest.raises(ValueError, match="probe is empty"):
        exemplars(net, probe[:0], "0")
    with pytest.raises(ValueError, match="show="):
        exemplars(net, probe * 4 - 2, "0")
    assert exemplars(net, probe * 4 - 2, "0", show=lambda x: (x + 2) / 4).pictures().shape[1] == 5
    with pytest.raises(ValueError, match="keep=True"):
        exemplars(net, probe * 4 - 2, "0", keep=False).pictures()
    with pytest.raises(ValueError, match="expected a tensor"):
        exemplars(net, 3, "0")


def test_an_unknown_layer_lists_its_neighbours() -> None:
    net = nn.Sequential()
    net.add_module("layer1", nn.Conv2d(3, 2, 1))
    net.add_module("layer2", nn.Conv2d(2, 2, 1))
    with pytest.raises(UnknownLayer, match="layer1"):
        exemplars(net, images(3), "layer3")


def test_a_layer_that_gives_nonsense_is_refused() -> None:
    net = small_net()
    with torch.no_grad():
        net[0].bias[0] = float("nan")
    with pytest.raises(ModelError, match="NaN"):
        exemplars(net, images(3), "0")
    with pytest.raises(ValueError, match="one size"):
        exemplars(red_copier(), [images(2, 8), images(2, 9)], "0")


def test_a_picture_is_encoded_once_however_many_units_it_drives() -> None:
    found = exemplars(small_net(), images(90), "0", k=6)
    assert len(found.stored) < found.image_ids.numel()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 3, stride=2)).eval()
    encoder, seen = RegionEncoder(net, ["1", "2"]), []
    net.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    together = encoder.encode(found, rows=2)
    assert sum(seen) == len(found.stored)
    torch.testing.assert_close(together, encoder.encode((found.pictures(), found.masks())), rtol=1e-4, atol=1e-5)
