"""``log_stats``: what loggers are given, and when the device is read."""

import pytest
import torch

import marginkernels as mk


class Board:
    def __init__(self):
        self.seen = []

    def add_scalar(self, tag, value, step):
        self.seen.append((tag, value, step))


class Run:
    def __init__(self):
        self.seen = []

    def log(self, values, step=None):
        self.seen.append((values, step))


@pytest.fixture
def head():
    torch.manual_seed(0)
    head = mk.MarginHead(8, 10, mk.CurricularFace())
    head(torch.randn(6, 8), torch.arange(6))
    return head


def test_a_board_gets_each_number(head):
    board = Board()
    loss = torch.tensor(3.5, requires_grad=True)
    found = mk.log_stats(head, board, 7, prefix="arc/", loss=loss, lr=0.1)
    assert board.seen == [(tag, value, 7) for tag, value in found.items()]
    want = {f"arc/{k}": float(v) for k, v in head.stats.items()} | {"arc/loss": 3.5, "arc/lr": 0.1}
    assert list(found) == list(want)
    assert found == want
    assert {"arc/target_angle", "arc/beyond_margin", "arc/t"} <= want.keys()
    assert all(type(value) is float for value in found.values())


def test_a_run_gets_all_at_once(head):
    run = Run()
    found = mk.log_stats(head, run, 2)
    assert run.seen == [(found, 2)]
    assert found["head/top1"] == float(head.stats["top1"])
    both = type("Both", (Board, Run), {})()
    mk.log_stats(head, both, 2)
    assert all(len(seen) == 3 for seen in both.seen)


def test_steps_between_read_nothing(head, monkeypatch):
    board = Board()
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: pytest.fail("the device was read"))
    assert mk.log_stats(head, board, 3, every=2) == {}
    assert board.seen == []
    monkeypatch.undo()
    assert mk.log_stats(head, board, 4, every=2)
    assert {step for _, _, step in board.seen} == {4}


def test_a_head_that_has_seen_nothing():
    board = Board()
    assert mk.log_stats(mk.MarginHead(8, 10, mk.ArcFace()), board, 0) == {}
    assert board.seen == []


def test_what_is_no_logger(head):
    with pytest.raises(TypeError, match=r"^logger: expected add_scalar.* got object without either"):
        mk.log_stats(head, object(), 0)
    with pytest.raises(ValueError, match=r"^every: expected an integer >= 1, got 0"):
        mk.log_stats(head, Board(), 0, every=0)


def test_a_writer_of_tensorboard(head, tmp_path):
    board = pytest.importorskip("torch.utils.tensorboard")
    with board.SummaryWriter(str(tmp_path)) as writer:
        mk.log_stats(head, writer, 1)
    assert list(tmp_path.iterdir())
