"""Trainers of other packages, where they are installed: a few steps end with the bits of a plain loop."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import marginkernels as mk

pytestmark = pytest.mark.slow

D, C = 12, 30


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Linear(D, D)
        self.head = mk.MarginHead(D, C, mk.CurricularFace(16.0, 0.3))

    def forward(self, x, labels):
        return {"loss": self.head(self.backbone(x), labels)}


def rows():
    g = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(D, generator=g), "labels": torch.tensor(i % C)} for i in range(24)]


def plain():
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for b in DataLoader(rows(), batch_size=8):
        optimizer.zero_grad()
        net(**b)["loss"].backward()
        optimizer.step()
    return net.state_dict()


def near(a, b):
    assert a.keys() == b.keys()
    for name, v in a.items():
        torch.testing.assert_close(v.cpu(), b[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_lightning(package, tmp_path):
    pl = pytest.importorskip(package)

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def training_step(self, b, _):
            return self.net(**b)["loss"]

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Module()
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    pl.Trainer(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, **options).fit(module, DataLoader(rows(), batch_size=8))
    near(module.net.state_dict(), plain())


def test_accelerate():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    net = Net()
    net, optimizer, loader = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1), DataLoader(rows(), batch_size=8))
    for b in loader:
        optimizer.zero_grad()
        accelerator.backward(net(**b)["loss"])
        accelerator.clip_grad_norm_(net.parameters(), 1e9)
        optimizer.step()
    near(accelerator.unwrap_model(net).state_dict(), plain())


def test_hugging_face_trainer(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    net = Net()
    before = copy.deepcopy(net.state_dict())
    settings = {"per_device_train_batch_size": 8, "max_steps": 3, "report_to": [], "save_strategy": "no", "use_cpu": True}
    arguments = transformers.TrainingArguments(str(tmp_path), **settings, optim="sgd", learning_rate=0.1, disable_tqdm=True)
    transformers.Trainer(net, arguments, train_dataset=rows()).train()
    assert not torch.equal(net.state_dict()["head.weight"], before["head.weight"])
    assert all(v.isfinite().all() for v in net.state_dict().values())
