"""Backends with something wrong, for ``verify`` to find: each is ``ChunkedBackend`` but for one thing."""

from __future__ import annotations

import dataclasses
import os
import time

import torch

from marginkernels.backend.chunked import ChunkedBackend


class Right(ChunkedBackend):
    name = "planted"

    def row_pass(self, inputs, request):
        return self.spoil(super().row_pass(inputs, request), request)

    def spoil(self, out, request):
        return out


class Wrong(Right):
    def spoil(self, out, request):
        return dataclasses.replace(out, lse=out.lse + 0.1)


class NotANumber(Right):
    def spoil(self, out, request):
        return dataclasses.replace(out, mean_center=torch.full_like(out.mean_center, torch.nan))


class Unwritten(Right):
    """Leaves the last class's factor as it found the memory."""

    def spoil(self, out, request):
        left = torch.empty_like(out.mean_center)
        if left.numel():
            left[:-1] = out.mean_center[:-1]
        return dataclasses.replace(out, mean_center=left)


class Restless(Right):
    """Right to the last bit but one, in another way each time."""

    calls = 0

    def spoil(self, out, request):
        Restless.calls += 1
        return dataclasses.replace(out, mean_center=out.mean_center * (1 + Restless.calls * 2.0**-22))


class WrongSearch(Right):
    def topk(self, inputs, k):
        found = super().topk(inputs, k)
        return dataclasses.replace(found, classes=(found.classes + 1) % inputs.w.shape[0])


class FirstCenter(Right):
    """Takes the first center of each class for all of it."""

    def row_pass(self, inputs, request):
        return super().row_pass(dataclasses.replace(inputs, w=self.first(inputs)), request)

    def topk(self, inputs, k):
        return super().topk(dataclasses.replace(inputs, w=self.first(inputs)), k)

    def first(self, inputs):
        return inputs.w[:: inputs.sub_centers].repeat_interleave(inputs.sub_centers, 0)


class Raising(Right):
    def spoil(self, out, request):
        raise RuntimeError("out of luck")


class OutOfMemory(Right):
    def spoil(self, out, request):
        raise MemoryError("so many bytes")


class Crashing(Right):
    def spoil(self, out, request):
        os.abort()


class Hanging(Right):
    def spoil(self, out, request):
        while True:
            time.sleep(60)


right, wrong, not_a_number, unwritten, restless = Right(), Wrong(), NotANumber(), Unwritten(), Restless()
first_center, wrong_search, raising, out_of_memory, crashing, hanging = (
    FirstCenter(),
    WrongSearch(),
    Raising(),
    OutOfMemory(),
    Crashing(),
    Hanging(),
)
