# SPDX-License-Identifier: Apache-2.0
"""What is measured of sdseg: every way runs, does the same, and is the way that it says."""

from __future__ import annotations

import pytest
import torch

from shared.networks.kl_autoencoder import KLAutoencoder
from shared.networks.upsampling_convolution import UpsampledConvolution
from shared.segmentation_sampler import SegmentationSampler
from tests.tiny_networks import film_unet, segmentation_model
from tools.benchmarks.sdseg import WORKLOADS
from tools.benchmarks.sdseg_diffusers import diffusers_unet, in_our_names
from tools.benchmarks.sdseg_programs import Inference, with_default_attention, with_default_upsampling
from tools.benchmarks.sdseg_sampling import dice, masks_equal
from tools.benchmarks.sdseg_training import BASELINE, HALF_LIMITS, Stage
from tools.benchmarks.trained import Trained, equally_trained
from tools.benchmarks.workload import Kind, Setting, Size

TINY = Setting(size=Size.TINY)
BUILDERS = [(kind, builder) for kind, builders in WORKLOADS.items() for builder in builders]


def disturbed(result):
    """A result that another program would give."""
    if isinstance(result, Trained):
        return result._replace(gradients=result.gradients.roll(1))
    if isinstance(result, dict):
        return {**result, "image": result["image"] + 0.1}
    return ~result if result.dtype == torch.bool else result + 0.1


@pytest.mark.parametrize(("kind", "builder"), BUILDERS, ids=[builder.__name__ for _, builder in BUILDERS])
def test_every_way_does_the_same(kind, builder):
    workload = builder(TINY)
    results = {name: way() for name, way in workload.ways.items()}
    assert "sdseg" in list(results)[-1]
    assert workload.equal(results)
    if builder.__name__ == "reverse_steps":
        empty = torch.zeros_like(results[list(results)[-1]])
        faulty = {**results, list(results)[-1]: empty}
    else:
        faulty = {**results, list(results)[-1]: disturbed(results[list(results)[-1]])}
    with pytest.raises(ValueError, match="sdseg"):
        workload.equal(faulty)
    again = workload.ways[list(results)[-1]]()
    assert workload.equal({**results, list(results)[-1]: again}) == workload.equal(results), "a run leaves traces"


def test_all_kinds_are_there():
    assert set(WORKLOADS) == {Kind.TRAIN, Kind.SAMPLE, Kind.METRIC, Kind.DATA, Kind.MEMORY}


class TestInference:
    def test_each_lever_is_what_it_is_called(self, monkeypatch):
        work = Inference(TINY, 2)
        seen: dict[str, list] = {"batch": [], "type": [], "strides": [], "flash": [], "upsampling": []}
        plain = SegmentationSampler.__call__

        def watched(self, inputs, network, seeds=None):
            convolution = network.autoencoder.decoder.blocks[-1]
            handle = convolution.register_forward_hook(lambda module, args, out: seen["type"].append(out.dtype))
            seen["batch"].append(len(inputs))
            weight = network.autoencoder.decoder.blocks[1].conv1.conv.weight
            seen["strides"].append(weight.is_contiguous(memory_format=torch.channels_last))
            flags = {
                module.use_flash_attention for module in network.modules() if hasattr(module, "use_flash_attention")
            }
            seen["flash"].append(flags)
            seen["upsampling"].append(any(isinstance(module, UpsampledConvolution) for module in network.modules()))
            try:
                return plain(self, inputs, network, seeds)
            finally:
                handle.remove()

        monkeypatch.setattr(SegmentationSampler, "__call__", watched)
        work.program(default_attention=True, default_upsampling=True)()
        assert seen == {
            **{"batch": [1, 1], "type": [torch.float32] * 2, "strides": [False] * 2, "flash": [{False}] * 2},
            "upsampling": [False] * 2,
        }
        for values in seen.values():
            values.clear()
        work.program(amp=True, images_per_batch=2)()
        assert seen == {
            **{"batch": [2], "type": [torch.bfloat16], "strides": [True], "flash": [{True}], "upsampling": [True]},
        }

    @torch.no_grad()
    def test_defaults_of_monai_give_the_same_numbers(self):
        model = segmentation_model()
        z = torch.randn((1, 3, 8, 12), generator=torch.Generator().manual_seed(1))
        expected, keys = model.decode(z), model.state_dict().keys()
        with_default_upsampling(with_default_attention(model))
        assert model.state_dict().keys() == keys
        torch.testing.assert_close(model.decode(z), expected, atol=1e-4, rtol=0)

    def test_masks_that_cannot_differ_are_refused(self):
        empty = torch.zeros(2, 4, 6, dtype=torch.bool)
        with pytest.raises(ValueError, match="^a: expected masks with foreground and background"):
            masks_equal({"a": empty, "b in bfloat16": empty})

    def test_dice(self):
        one = torch.tensor([True, True, False, False])
        assert dice(one, torch.tensor([True, False, True, False])) == 0.5
        assert dice(~one & one, ~one & one) == 1.0


class TestTraining:
    def test_the_published_loop_encodes_in_every_step_and_the_bundle_never(self):
        stage = Stage(TINY, steps=2, batch_size=2)
        calls: list[int] = []
        plain = KLAutoencoder.encode

        def counted(self, x):
            calls.append(len(x))
            return plain(self, x)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(KLAutoencoder, "encode", counted)
            published = stage.published()
            published()
            assert calls == [2, 2]
            bundle = stage.bundle()
            calls.clear()
            bundle()
            assert calls == []

    def test_other_weights_are_told_apart(self):
        result = Trained(torch.ones(2), torch.ones(6), torch.ones(6))
        with pytest.raises(ValueError, match=r"^sdseg: expected updates within 0.05 of published"):
            equally_trained(
                {BASELINE: result, "sdseg": result._replace(updates=1.1 * torch.ones(6))}, half_limits=HALF_LIMITS
            )

    @torch.no_grad()
    def test_diffusers_has_the_same_network(self):
        ours = film_unet().eval()
        theirs = diffusers_unet(ours).eval()
        x, timesteps = torch.randn(2, 6, 8, 12), torch.tensor([3, 999])
        torch.testing.assert_close(theirs(x, timesteps).sample, ours(x, timesteps), atol=1e-5, rtol=0)
        back = in_our_names(dict(theirs.named_parameters()), ours)
        assert all(torch.equal(back[name], parameter) for name, parameter in ours.named_parameters())

    def test_what_diffusers_does_not_build_is_named(self):
        with pytest.raises(ValueError, match="^unet: expected one without labels"):
            diffusers_unet(film_unet(num_classes=3))
