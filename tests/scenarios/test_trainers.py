"""Trainers of other packages, where they are installed: they end with the bits of a plain loop, clip, cast, save and resume.

pip install lightning pytorch-lightning accelerate transformers
python -m pytest tests/scenarios/test_trainers.py --slow
"""

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import marginkernels as mk

pytestmark = pytest.mark.slow

D, C = 12, 30
#: What a head that samples its classes needs, so that trainers can clip its gradients as any other's.
SAMPLED = {"sample_rate": 0.5, "sparse_grad": False}


class Net(nn.Module):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Linear(D, D)
        self.head = mk.MarginHead(D, C, mk.CurricularFace(16.0, 0.3), **options)

    def forward(self, x, labels):
        return {"loss": self.head(self.backbone(x), labels)}


def rows():
    g = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(D, generator=g), "labels": torch.tensor(i % C)} for i in range(24)]


def sgd(net):
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)


def plain(clip=None, epochs=1, cast=contextlib.nullcontext, **options):
    net = Net(**options)
    optimizer = sgd(net)
    for b in list(DataLoader(rows(), batch_size=8)) * epochs:
        optimizer.zero_grad()
        with cast():
            loss = net(**b)["loss"]
        loss.backward()
        if clip:
            clip(net.parameters())
        optimizer.step()
    return net.state_dict()


def by_norm(parameters):
    assert nn.utils.clip_grad_norm_(parameters, 0.1) > 0.2


def by_value(parameters):
    nn.utils.clip_grad_value_(parameters, 0.01)


def bfloat16():
    return torch.autocast("cpu", torch.bfloat16)


def near(a, b):
    assert a.keys() == b.keys()
    for name, v in a.items():
        torch.testing.assert_close(v.cpu(), b[name], rtol=1e-5, atol=1e-6, msg=name)


def same(a, b):
    assert a.keys() == b.keys()
    for name, v in a.items():
        assert torch.equal(v, b[name]), name


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def lightning(request, tmp_path):
    """Trains, as Lightning does it: gives the state, and the checkpoint that it wrote."""
    pl = pytest.importorskip(request.param)

    class Module(pl.LightningModule):
        def __init__(self, **options):
            super().__init__()
            self.net = Net(**options)

        def training_step(self, b, _):
            return self.net(**b)["loss"]

        def configure_optimizers(self):
            return sgd(self)

    def fit(resume=None, options=None, **settings):
        module = Module(**options or {})
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path}
        trainer = pl.Trainer(**{"max_epochs": 1, "accelerator": "cpu", "enable_checkpointing": False} | quiet | settings)
        trainer.fit(module, DataLoader(rows(), batch_size=8), ckpt_path=resume)
        path = tmp_path / "last.ckpt"
        trainer.save_checkpoint(path)
        return module.net.state_dict(), path

    return fit


def test_lightning(lightning):
    near(lightning()[0], plain())


@pytest.mark.parametrize("options", [{}, SAMPLED])
def test_lightning_clips(lightning, options):
    near(lightning(options=options, gradient_clip_val=0.1)[0], plain(by_norm, **options))
    near(lightning(options=options, gradient_clip_val=0.01, gradient_clip_algorithm="value")[0], plain(by_value, **options))


def test_lightning_does_not_clip_sparse_gradients(lightning):
    """It raises, rather than to clip by another norm."""
    with pytest.raises(NotImplementedError, match="SparseCPU"):
        lightning(options={"sample_rate": 0.5}, gradient_clip_val=0.1)


def test_lightning_casts(lightning):
    found, _ = lightning(precision="bf16-mixed")
    assert {found[name].dtype for name, _ in Net().named_parameters()} == {torch.float32}
    near(found, plain(cast=bfloat16))


@pytest.mark.parametrize("options", [{}, SAMPLED])
def test_lightning_scales_and_clips(lightning, request, options):
    """float16 with a gradient scaler, and the norm taken of what is unscaled."""
    plugins = pytest.importorskip(f"{request.node.callspec.params['lightning']}.plugins")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    found, _ = lightning(options=options, plugins=[plugins.MixedPrecision("16-mixed", "cpu", scaler)], gradient_clip_val=0.1)
    net, scaler = Net(**options), torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = sgd(net)
    for b in DataLoader(rows(), batch_size=8):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = net(**b)["loss"]
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        by_norm(net.parameters())
        scaler.step(optimizer)
        scaler.update()
    near(found, net.state_dict())
    assert not torch.equal(found["head.weight"], Net(**options).head.weight)


@pytest.mark.parametrize("options", [{}, SAMPLED])
def test_lightning_accumulates_and_resumes(lightning, options):
    whole, _ = lightning(options=options, max_epochs=3, accumulate_grad_batches=2)
    _, path = lightning(options=options, max_epochs=1, accumulate_grad_batches=2)
    again, _ = lightning(path, options=options, max_epochs=3, accumulate_grad_batches=2)
    same(again, whole)


def accelerated(accelerator, net, clip=None, epochs=1, path=None):
    net, optimizer, loader = accelerator.prepare(net, sgd(net), DataLoader(rows(), batch_size=8))
    if path:
        accelerator.load_state(path)
    for _ in range(epochs):
        for b in loader:
            with accelerator.accumulate(net):
                optimizer.zero_grad()
                with accelerator.autocast():
                    loss = net(**b)["loss"]
                accelerator.backward(loss)
                if clip:
                    clip(net.parameters())
                optimizer.step()
    return accelerator.unwrap_model(net).state_dict()


@pytest.fixture
def accelerator():
    accelerate = pytest.importorskip("accelerate")
    yield lambda **options: accelerate.Accelerator(cpu=True, **options)
    accelerate.state.AcceleratorState._reset_state(True)


@pytest.mark.parametrize("options", [{}, SAMPLED])
def test_accelerate(accelerator, options):
    one = accelerator()
    near(accelerated(one, Net(**options)), plain(**options))
    near(accelerated(one, Net(**options), lambda p: one.clip_grad_norm_(p, 0.1)), plain(by_norm, **options))
    near(accelerated(one, Net(**options), lambda p: one.clip_grad_value_(p, 0.01)), plain(by_value, **options))


def test_accelerate_casts(accelerator):
    near(accelerated(accelerator(mixed_precision="bf16"), Net()), plain(cast=bfloat16))


@pytest.mark.parametrize("options", [{}, SAMPLED])
def test_accelerate_resumes(accelerator, tmp_path, options):
    accelerated(one := accelerator(), Net(**options))
    one.save_state(tmp_path / "state")
    other = Net(**options)
    nn.init.normal_(other.head.weight)
    same(accelerated(accelerator(), other, path=tmp_path / "state"), plain(epochs=2, **options))


@pytest.fixture
def trainer(tmp_path):
    """Trains, as Hugging Face's Trainer does it: shuffled, clipped to a norm of 1, with a schedule."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    def train(options=None, resume=None, **settings):
        net = Net(**options or {})
        quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "logging_strategy": "no", "save_strategy": "no"}
        usual = {"per_device_train_batch_size": 8, "max_steps": 6, "optim": "sgd", "learning_rate": 0.1}
        arguments = transformers.TrainingArguments(str(tmp_path), **quiet | usual | settings)
        transformers.Trainer(net, arguments, train_dataset=rows()).train(resume_from_checkpoint=resume)
        return net.state_dict()

    return train


@pytest.mark.parametrize("options", [{}, SAMPLED])
@pytest.mark.parametrize("settings", [{}, {"bf16": True}, {"gradient_accumulation_steps": 2}, {"max_grad_norm": 0.1}])
def test_hugging_face_trainer(trainer, options, settings):
    before = copy.deepcopy(Net(**options).state_dict())
    found = trainer(options, **settings)
    assert not torch.equal(found["head.weight"], before["head.weight"])
    assert found["head.weight"].dtype == torch.float32
    assert all(v.isfinite().all() for v in found.values())
    if options:  # of three batches in an epoch, steps of two leave one over
        assert found["head.sampler.draws"] == (9 if "gradient_accumulation_steps" in settings else 6)


@pytest.mark.parametrize("options", [{}, SAMPLED])
def test_hugging_face_trainer_resumes(trainer, tmp_path, options):
    whole = trainer(options, save_strategy="steps", save_steps=3)
    assert (tmp_path / "checkpoint-3").is_dir()
    same(trainer(options, resume=str(tmp_path / "checkpoint-3")), whole)


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_hugging_face_trainer_takes_no_sparse_gradients(trainer, max_grad_norm):
    """It takes their norm also where it does not clip."""
    with pytest.raises(NotImplementedError, match="SparseCPU"):
        trainer({"sample_rate": 0.5}, max_grad_norm=max_grad_norm)
