# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.data import MetaTensor
from PIL import Image
from torch import nn

from shared.inferers import GuidedLatentSampler, guide, sample_latents, seeded_noise
from shared.schedulers import DDIMScheduler, DPMSolverMultistepScheduler, diffusion_timesteps

BUNDLE = Path(__file__).parents[1] / "bundles" / "cxr_ldm"
CHEST = {"schedule": "scaled_linear_beta", "beta_start": 0.0015, "beta_end": 0.0205, "prediction_type": "v_prediction"}
LATENT = (3, 4, 6)


class FakeModel(nn.Module):
    """Small enough to reason about: a convolution plus the mean of the embedded text."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(3, 3, 3, padding=1)
        self.embedding = nn.Embedding(50, 3)
        self.forwards: list[int] = []
        self.encoded: list[torch.Tensor] = []
        self.decoded: list[int] = []

    def forward(self, x, timesteps, tokens=None, context=None):
        self.forwards.append(len(x))
        shift = context.mean(dim=1)[:, :, None, None] * timesteps[:, None, None, None] / 1000
        return torch.tanh(self.convolution(x) + shift)

    def encode_text(self, tokens):
        self.encoded.append(tokens)
        return self.embedding(tokens)

    def decode(self, z):
        self.decoded.append(len(z))
        return nn.functional.interpolate(z.mean(dim=1, keepdim=True) + 0.5, scale_factor=2)


def sampler(**options) -> GuidedLatentSampler:
    defaults = {
        "scheduler": DPMSolverMultistepScheduler(1000, **CHEST),
        "num_inference_steps": 5,
        "guidance_scale": 3.0,
        "latent_shape": LATENT,
    }
    return GuidedLatentSampler(**{**defaults, **options})


def tokens(count: int) -> torch.Tensor:
    prompts = torch.arange(1, count + 1)[:, None].expand(count, 7)
    return torch.stack((prompts, torch.zeros_like(prompts)), dim=1)


def test_images_are_in_range_and_keep_the_aspect():
    images = sampler()(tokens(2), FakeModel())
    assert images.shape == (2, 1, 8, 12)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1
    assert not images.requires_grad


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_a_sample_depends_on_its_seed_alone(scale, scheduler):
    model, seeds = FakeModel(), [11, 3, 7, 3, 0]
    sample = sampler(scheduler=scheduler(1000, **CHEST), guidance_scale=scale, decode_batch_size=2)
    inputs = tokens(5)
    together = sample(inputs, model, seeds=seeds)
    alone = torch.cat([sample(inputs[i : i + 1], model, seeds=[seeds[i]]) for i in range(5)])
    assert torch.allclose(together, alone, atol=1e-5)
    order = [4, 2, 0, 1, 3]
    shuffled = sample(inputs[order], model, seeds=torch.tensor([seeds[i] for i in order]))
    assert torch.allclose(together[order], shuffled, atol=1e-5)
    in_twos = sampler(scheduler=sample.scheduler, guidance_scale=scale, batch_size=2)
    assert torch.allclose(together, in_twos(inputs, model, seeds=seeds), atol=1e-5)
    assert (together[0] - together[2]).abs().max() > 0.01


def test_seeds_count_up_from_the_seed():
    model = FakeModel()
    assert torch.equal(sampler(seed=5)(tokens(3), model), sampler()(tokens(3), model, seeds=[5, 6, 7]))
    assert torch.equal(seeded_noise([5], (2, 3)), torch.randn(1, 2, 3, generator=torch.Generator().manual_seed(5)))


@pytest.mark.parametrize(
    ("scale", "forward_batch", "encoded"), [(0.0, 2, [0, 0]), (1.0, 2, [1, 2]), (3.0, 4, [0, 0, 1, 2])]
)
def test_only_the_needed_branches_are_computed(scale, forward_batch, encoded):
    model = FakeModel()
    sampler(guidance_scale=scale)(tokens(2), model)
    assert model.forwards == [forward_batch] * 5
    assert len(model.encoded) == 1
    assert model.encoded[0][:, 0].tolist() == encoded


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_single_branch_equals_the_guided_formula(scale):
    model, inputs = FakeModel(), tokens(2)
    # Just off 0 and 1 both branches are computed.
    both = sampler(guidance_scale=abs(scale - 1e-7))(inputs, model)
    assert torch.allclose(sampler(guidance_scale=scale)(inputs, model), both, atol=1e-5)


def test_sampler_equals_a_plain_loop():
    model, inputs = FakeModel(), tokens(1)
    scheduler = DDIMScheduler(1000, **CHEST)
    x = torch.randn((1, *LATENT), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        null, text = model.embedding(inputs[:, 1]), model.embedding(inputs[:, 0])
        for timestep in diffusion_timesteps(scheduler, 5):
            t = torch.tensor([timestep])
            u, c = model(x, t, context=null), model(x, t, context=text)
            x, _ = scheduler.step(u + 3.0 * (c - u), timestep, x)
        expected = model.decode(x).clamp(0, 1)
    actual = sampler(scheduler=DDIMScheduler(1000, **CHEST), seed=4)(inputs, model)
    assert torch.allclose(actual, expected, atol=1e-6)


def test_decoding_is_chunked():
    model = FakeModel()
    sampler(decode_batch_size=2)(tokens(5), model)
    assert model.decoded == [2, 2, 1]


@pytest.mark.reliability(9)
def test_sampling_loop_recovers_the_data_of_a_perfect_network():
    clean = torch.linspace(-2, 2, 24).reshape(1, 1, 4, 6)
    scheduler = DPMSolverMultistepScheduler(1000, **{**CHEST, "prediction_type": "sample"})
    timesteps = diffusion_timesteps(scheduler, 10)
    result = sample_latents(lambda x, t: clean, scheduler, torch.randn_like(clean), timesteps)
    assert torch.allclose(result, clean, atol=1e-5)


def test_guidance_and_its_rescaling():
    u, c = torch.randn(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(guide(u, c, 1.0), u + (c - u))
    assert torch.equal(guide(u, c, 0.0), u)
    rescaled = guide(u, c, 7.0, rescale=1.0)
    assert torch.allclose(rescaled.std(dim=(1, 2, 3)), c.std(dim=(1, 2, 3)), rtol=1e-5)
    assert guide(u.half(), c.half(), 7.0).dtype == torch.float32


def test_meta_data_survives_and_plain_stays_plain():
    inputs = MetaTensor(tokens(1), meta={"filename_or_obj": "prompt.txt"})
    images = sampler()(inputs, FakeModel())
    assert isinstance(images, MetaTensor)
    assert images.meta["filename_or_obj"] == "prompt.txt"
    assert images.dtype == torch.float32
    assert not isinstance(sampler()(tokens(1), FakeModel()), MetaTensor)


def test_wrapped_networks_are_unwrapped():
    model = FakeModel()
    assert torch.equal(sampler()(tokens(1), nn.DataParallel(model)), sampler()(tokens(1), model))


def test_client_options_may_be_strings_and_lists():
    schedulers = {"dpm": DPMSolverMultistepScheduler(1000, **CHEST), "ddim": DDIMScheduler(1000, **CHEST)}
    sample = GuidedLatentSampler(
        scheduler=["ddim", "dpm"],
        schedulers=schedulers,
        num_inference_steps="4",
        guidance_scale=["2.5", "7"],
        seed="9",
        latent_shape=list(LATENT),
    )
    assert sample.scheduler is schedulers["ddim"]
    assert (sample.num_inference_steps, sample.guidance_scale, sample.seed) == (4, 2.5, 9)
    assert isinstance(sample.num_inference_steps, int)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"num_inference_steps": 0}, r"^num_inference_steps: expected a whole number from 1 to 1000, got 0"),
        ({"num_inference_steps": "2.5"}, r"^num_inference_steps: expected a whole number"),
        ({"guidance_scale": "strong"}, r"^guidance_scale: expected a number from 0 to 100, got 'strong'"),
        ({"guidance_scale": float("nan")}, r"^guidance_scale"),
        ({"guidance_rescale": 2}, r"^guidance_rescale: expected a number from 0 to 1"),
        ({"seed": -1}, r"^seed: expected a whole number from 0"),
        ({"scheduler": "pndm", "schedulers": {"dpm": DDIMScheduler()}}, r"^scheduler: expected dpm, got 'pndm'"),
    ],
)
def test_bad_options_name_the_key(option, message):
    with pytest.raises(ValueError, match=message):
        sampler(**option)


def test_bad_inputs_are_named():
    with pytest.raises(ValueError, match=r"^image: expected integer token ids \(B, 2, L\)"):
        sampler()(torch.zeros(1, 2, 77), FakeModel())
    with pytest.raises(ValueError, match=r"^seeds: expected one per sample \(2\), got 1"):
        sampler()(tokens(2), FakeModel(), seeds=[1])
    broken = FakeModel()
    nn.init.constant_(broken.convolution.bias, float("nan"))
    with pytest.raises(ValueError, match=r"^guidance_scale: expected finite latents.* seeds \[0, 1\]"):
        sampler()(tokens(2), broken)


# The configuration, with the small networks of tiny.json.


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    shutil.copytree(BUNDLE / "configs", tmp_path / "configs")
    shutil.copytree(BUNDLE / "models" / "tokenizer", tmp_path / "models" / "tokenizer")
    parser = ConfigParser()
    parser.read_config([str(tmp_path / "configs" / name) for name in ("inference.json", "tiny.json")])
    parser["bundle_root"] = str(tmp_path)
    torch.manual_seed(0)
    network = parser.get_parsed_content("network_def")
    # The last convolution starts at zero: without this every prompt would give the same picture.
    nn.init.normal_(network.unet.out[2].conv.weight, std=0.1)
    nn.init.normal_(network.text_encoder.position_embedding, std=0.5)
    for folder in (tmp_path / "models", tmp_path / "models" / "tiny"):
        folder.mkdir(exist_ok=True)
        torch.save(network.state_dict(), folder / "model.pt")
    return tmp_path


def workflow(bundle: Path, **override) -> ConfigWorkflow:
    logger = logging.getLogger("monai.bundle.workflows")
    logger.disabled = True  # it warns that logging_file is False, which is meant
    configs = bundle / "configs"
    flow = ConfigWorkflow(
        workflow_type="inference",
        config_file=[str(configs / "inference.json"), str(configs / "tiny.json")],
        meta_file=str(configs / "metadata.json"),
        logging_file=False,
        bundle_root=str(bundle),
        device="$torch.device('cpu')",
        num_inference_steps=2,
        **{"inferer#progress": False},
        **override,
    )
    logger.disabled = False
    return flow


def read_picture(path: Path) -> torch.Tensor:
    with Image.open(path) as picture:
        return torch.from_numpy(np.asarray(picture).astype(np.int64))


def run(bundle: Path, **override) -> Path:
    flow = workflow(bundle, **override)
    flow.initialize()
    flow.run()
    return bundle / override.get("output_dir", "eval")


def test_inference_has_every_property(bundle):
    flow = workflow(bundle)
    flow.initialize()
    assert flow.check_properties() == []


def test_inference_writes_named_pictures(bundle):
    prompts = bundle / "prompts.txt"
    prompts.write_text("Cardiomegaly.\n\nNo_finding.\n", encoding="utf-8")
    folder = run(bundle, prompt=str(prompts), num_samples=2, seed=5, batch_size=3, guidance_scale=2.0)
    assert sorted(path.name for path in folder.glob("?_*")) == [
        f"{name}.{suffix}" for name in ("0_5", "0_6", "1_7", "1_8") for suffix in ("json", "png")
    ]
    said = json.loads((folder / "1_8.json").read_text())
    assert said["prompt"] == "No_finding."
    assert (said["seed"], said["guidance_scale"], said["num_inference_steps"], said["scheduler"]) == (8, 2.0, 2, "dpm")
    assert len(said["weights_sha256"]) == 64
    assert read_picture(folder / "1_8.png").shape == (128, 128)


def test_command_line_options_reach_the_sampler(bundle):
    parser = workflow(bundle, prompt="Edema.", seed=3, guidance_scale=1.5, scheduler="ddim").parser
    inferer = parser.get_parsed_content("inferer")
    assert (inferer.seed, inferer.guidance_scale, inferer.num_inference_steps) == (3, 1.5, 2)
    assert isinstance(inferer.scheduler, DDIMScheduler)
    assert parser.get_parsed_content("dataset#data")[0]["prompt"] == "Edema."


def test_picture_is_the_same_alone_and_in_a_batch(bundle):
    together = run(bundle, prompt=["Cardiomegaly.", "Edema."], batch_size=2, bits=16)
    alone = run(bundle, prompt="Edema.", seed=1, bits=16, output_dir=str(bundle / "alone"))
    pictures = [read_picture(path) for path in (together / "1_1.png", alone / "0_1.png")]
    assert (pictures[0] - pictures[1]).abs().max() <= 2
    other = read_picture(together / "0_0.png")
    assert (pictures[0] - other).abs().max() > 500


def label_answer(bundle: Path, request: dict) -> dict:
    """The steps of monailabel 0.8.5 BundleInferTask, without its server."""
    config = ConfigParser()
    config.read_config(str(bundle / "configs" / "label.json"))
    config.config.update({"bundle_root": str(bundle)})
    network = config.get_parsed_content("network_def")
    shown = config.get_parsed_content("displayable_configs")
    data = {**copy.deepcopy(shown), "device": "cpu", "model": "cxr_ldm", **request}
    data["image_path"] = data["image"]
    config["displayable_configs"].update({name: data[name] for name in shown})
    config.parse()
    config.config.update({"device": "cpu"})
    for transform in config.get_parsed_content("preprocessing").transforms:
        data = transform(data)
    network.load_state_dict(torch.load(bundle / "models" / "model.pt", weights_only=True))
    with torch.no_grad():
        data["pred"] = config.get_parsed_content("inferer")(data["image"][None], network.eval())[0]
    for transform in config.get_parsed_content("postprocessing").transforms:
        data = transform(data)
    return data


@pytest.fixture
def label_bundle(bundle):
    parser = ConfigParser()
    parser.read_config([str(bundle / "configs" / name) for name in ("inference.json", "tiny.json")])
    config = {k: v for k, v in parser.config.items() if k != "_meta_"}
    config["inferer"]["progress"] = False
    config["ckpt_dir"] = "$@bundle_root + '/models'"
    (bundle / "configs" / "label.json").write_text(json.dumps(config))
    return bundle


def test_monai_label_request_equals_the_command_line(label_bundle):
    options = {"prompt": "Cardiomegaly.", "seed": "3", "guidance_scale": 2.0, "num_inference_steps": 2}
    answer = label_answer(label_bundle, {"image": "", **options, "scheduler": ["ddim", "dpm"]})
    assert answer["result_extension"] == ".png"
    assert answer["result"]["synthetic"] is True
    assert not (label_bundle / "eval").exists()
    folder = run(label_bundle, prompt="Cardiomegaly.", seed=3, guidance_scale=2.0, scheduler="ddim")
    picture = read_picture(folder / "0_3.png")
    assert answer["pred"].shape == (128, 128)
    # MONAI Label's writer turns the array over.
    assert (torch.from_numpy(answer["pred"].T.astype(np.int64)) - picture).abs().max() <= 1


@pytest.mark.parametrize("evil", ["$__import__('os').mkdir('{}')", {"_target_": "os.mkdir", "path": "{}"}])
def test_monai_label_client_cannot_run_code(label_bundle, evil):
    trap = label_bundle / "trap"
    evil = json.loads(json.dumps(evil).replace("{}", str(trap)))
    for name in ("seed", "scheduler", "prompt"):
        for value in (evil, [evil]):
            # The web framework's error where that is installed: a ValueError would not reach the client.
            with pytest.raises(Exception, match=f"{name}: expected a plain number or text"):
                label_answer(label_bundle, {"image": "", "num_inference_steps": 2, name: value})
        assert not trap.exists()


def test_missing_weights_are_explained(bundle):
    (bundle / "models" / "tiny" / "model.pt").unlink()
    flow = workflow(bundle)
    flow.initialize()
    logging.disable(logging.CRITICAL)
    with pytest.raises(RuntimeError) as caught:
        flow.run()
    logging.disable(logging.NOTSET)
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    assert str(caught.value.__cause__).startswith(str(bundle / "models" / "tiny" / "model.pt"))
    assert "--ckpt_dir" in str(caught.value.__cause__)


def test_steps_are_taken_in_float32_whatever_the_network_computes_in():
    class Recording:
        def step(self, prediction, timestep, x):
            seen.append((timestep, prediction.dtype, x.dtype))
            return x - prediction, x

    seen = []
    latents = sample_latents(lambda x, t: x.bfloat16() / 2, Recording(), torch.ones(1, 2, 3, 4).half(), [7, 3])
    assert seen == [(7, torch.float32, torch.float32), (3, torch.float32, torch.float32)]
    torch.testing.assert_close(latents, torch.full((1, 2, 3, 4), 0.25))
