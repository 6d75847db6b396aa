"""The stack by hand, with hard actions; its conservation laws and gradients; the layout of active tokens."""

import pytest
import torch

from stackformer.memory_bank import banked_linear_attention_step
from stackformer.mixer_banked_linear_attention import address_memories
from stackformer.processing_stack import (
    flush_stack,
    init_stack,
    read_stack,
    step_stack,
    transfer_mass,
)
from stackformer.token_layout import TokenLayout

PUSH, STAY, POP = torch.eye(3, dtype=torch.float64)
X0 = torch.tensor([10.0, 20.0], dtype=torch.float64)
T1, T2, T3, T4, T5 = (torch.tensor([float(i), -float(i)], dtype=torch.float64) for i in range(1, 6))


def half(x):
    """A stand-in for the normalisation that is easy to compute by hand."""
    return x / 2


def frames_of(*frames):
    return torch.stack(frames)


def test_push_push_pop_pop_by_hand():
    stack = init_stack(X0, depth=3, max_steps=5)
    assert stack.pointer.tolist() == [1, 0, 0]
    assert torch.equal(read_stack(stack), X0)

    stack = step_stack(stack, PUSH, T1, X0, 1, half)  # the caller keeps T1, the callee starts from it
    assert stack.pointer.tolist() == [0, 1, 0]
    assert torch.equal(stack.frames, frames_of(T1, T1, X0))
    assert torch.equal(read_stack(stack), T1)

    stack = step_stack(stack, PUSH, T2, X0, 2, half)
    assert stack.pointer.tolist() == [0, 0, 1]
    assert torch.equal(stack.frames, frames_of(T1, T2, T2))

    stack = step_stack(
        stack, POP, T3, X0, 3, half
    )  # what returns is added to the caller and normalised, then erased
    assert stack.pointer.tolist() == [0, 1, 0]
    assert torch.equal(stack.frames, frames_of(T1, (T2 + T3) / 2, X0))
    assert torch.equal(read_stack(stack), (T2 + T3) / 2)

    stack = step_stack(stack, POP, T4, X0, 4, half)
    assert stack.pointer.tolist() == [1, 0, 0]
    assert torch.equal(stack.frames, frames_of((T1 + T4) / 2, X0, X0))
    assert torch.equal(stack.output, torch.zeros(2, dtype=torch.float64))
    assert stack.dropped.sum() == 0

    stack = step_stack(stack, POP, T5, X0, 5, half)  # off the bottom: this is the output
    assert stack.pointer.tolist() == [0, 0, 0]
    assert torch.equal(stack.output, T5)
    assert stack.dropped.tolist() == [0, 0, 0, 0, 1]


def test_noop_and_push_at_the_top():
    stack = step_stack(init_stack(X0, depth=2, max_steps=3), STAY, T1, X0, 1, half)
    assert stack.pointer.tolist() == [1, 0]
    assert torch.equal(stack.frames, frames_of(T1, X0))
    stack = step_stack(stack, PUSH, T2, X0, 2, half)
    stack = step_stack(stack, PUSH, T3, X0, 3, half)  # already at the top: the frame in use takes the thought
    assert stack.pointer.tolist() == [0, 1]
    assert torch.equal(stack.frames, frames_of(T2, T3))


def test_soft_actions_by_hand():
    actions = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    stack = step_stack(init_stack(X0, depth=2, max_steps=3), actions, T1, X0, 1, half)
    assert stack.pointer.tolist() == [0.25, 0.5]
    assert torch.equal(stack.output, T1 / 4)
    assert stack.dropped.tolist() == [0.25, 0, 0]
    # Level 0: 3/4 is the thought, 1/4 returned and is erased. Level 1: half of it is the copy that was
    # called.
    assert torch.allclose(stack.frames, frames_of(0.75 * T1 + 0.25 * X0, 0.5 * T1 + 0.5 * X0))
    going_on = flush_stack(stack, torch.tensor(False), T2, 2)
    assert all(torch.equal(new, old) for new, old in zip(going_on, stack, strict=True))
    done = flush_stack(stack, torch.tensor(True), T2, 2)
    assert torch.equal(done.output, T1 / 4 + T2 * 0.75)
    assert done.dropped.tolist() == [0.25, 0.75, 0]
    assert done.pointer.tolist() == [0, 0]


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_mass_is_conserved(depth):
    torch.manual_seed(depth)
    stack = init_stack(torch.randn(7, 4), depth, 29)
    dropped = torch.zeros(7)
    for step in range(1, 30):
        actions = (3 * torch.randn(7, 3)).softmax(-1)
        dropped += transfer_mass(stack.pointer, actions).dropped
        stack = step_stack(stack, actions, torch.randn(7, 4), torch.randn(7, 4), step, half)
        assert (stack.pointer >= 0).all()
        assert ((stack.pointer.sum(-1) + dropped) - 1).abs().max() < 1e-6


def test_frames_stay_bounded():
    """Each new frame is a weighting of bounded things whose weights sum to at most one."""
    torch.manual_seed(0)
    embedding = torch.rand(50, 4) * 2 - 1
    stack = init_stack(embedding, 4, 99)
    for step in range(1, 100):
        actions = (3 * torch.randn(50, 3)).softmax(-1)
        stack = step_stack(
            stack, actions, torch.rand(50, 4) * 2 - 1, embedding, step, lambda x: x.clamp(-1, 1)
        )
        assert stack.frames.abs().max() <= 1 + 1e-5


def test_gradcheck():
    torch.manual_seed(0)
    embedding = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    thoughts = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)

    def ponder(embedding, logits, thoughts):
        stack = init_stack(embedding, 3, 4)
        reads = []
        for step in range(3):
            stack = step_stack(
                stack, logits[step].softmax(-1), thoughts[step], embedding, step + 1, torch.tanh
            )
            reads.append(read_stack(stack))
        stack = flush_stack(stack, torch.tensor([True, False]), thoughts[0], 4)
        return *stack, *reads

    assert torch.autograd.gradcheck(ponder, (embedding, logits, thoughts))


def test_addresses_are_pointer_times_bank():
    pointer = torch.tensor([[0.5, 0.25]])
    banks = torch.tensor([[[0.25, 0.75], [1.0, 0.0]]])
    expected = [[[0.125, 0.375, 0.0625, 0.1875], [0.5, 0.0, 0.25, 0.0]]]
    assert address_memories(pointer, banks).tolist() == expected


def difference_from_the_accumulation(rate: float, banks: int, seed: int, steps: int = 6) -> float:
    """The final memory against sum_k d_k M^(k): the norm of the difference over the norm of the sum.

    M^(k) is what the memory would be after step k if every write, and its decay, counted in full; d_k the
    mass dropped at step k. A memory decays by `rate` nats for a token that writes to it with weight 1.
    """
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tokens, heads, depth, key_size, value_size = 3, 2, 3, 4, 5
    start = (
        randn(tokens, heads, banks * depth, key_size, value_size),
        rand(tokens, heads, banks * depth, key_size),
    )
    stack = init_stack(randn(tokens, 2), depth, steps)
    written, full = start, start
    accumulated = [torch.zeros_like(part) for part in start]
    for step in range(1, steps + 1):
        query, key = rand(2, tokens, heads, key_size)
        value = randn(tokens, heads, value_size)
        of_banks = randn(tokens, heads, banks).softmax(-1)
        write = address_memories(stack.pointer, of_banks)
        decay = -rate * write
        mass = stack.pointer.sum(-1)
        _, written = banked_linear_attention_step(query, key, value, write, write, decay, written)
        in_full, decay_in_full = write / mass[:, None, None], decay / mass[:, None, None]
        _, full = banked_linear_attention_step(query, key, value, in_full, in_full, decay_in_full, full)
        actions = randn(tokens, 3).softmax(-1)
        dropped = transfer_mass(stack.pointer, actions).dropped if step < steps else mass
        stack = step_stack(stack, actions, randn(tokens, 2), stack.output, step, half)
        for total, part in zip(accumulated, full, strict=True):
            total += dropped.view(-1, *[1] * (part.dim() - 1)) * part
    return float((written[0] - accumulated[0]).norm() / accumulated[0].norm())


@pytest.mark.parametrize("seed", range(5))
def test_memory_is_the_accumulation_over_dropped_mass(seed):
    """Without decay, exactly. With decay, only about: docs/design.md has these figures."""
    for banks in (1, 4):
        assert difference_from_the_accumulation(0.0, banks, seed) < 1e-15
    assert 0.001 < difference_from_the_accumulation(0.1, 1, seed) < 0.02
    assert 0.1 < difference_from_the_accumulation(1.0, 1, seed) < 0.25
    assert 0.01 < difference_from_the_accumulation(1.0, 4, seed) < 0.04


MASKS = {
    "left": [[0, 0, 1, 1], [1, 1, 1, 1]],
    "right": [[1, 1, 1, 1], [1, 0, 0, 0]],
    "interior": [[1, 0, 0, 1], [0, 1, 0, 1]],
    "an empty row": [[0, 0, 0, 0], [0, 1, 1, 0]],
    "nothing": [[0, 0, 0, 0], [0, 0, 0, 0]],
    "everything": [[1, 1, 1, 1], [1, 1, 1, 1]],
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_layout_gathers_and_scatters(mask):
    mask = torch.tensor(mask).bool()
    layout = TokenLayout.from_mask(mask)
    batch = torch.arange(8).view(2, 4) + 1
    tokens = layout.gather(batch)
    assert tokens.tolist() == batch[mask].tolist()
    assert layout.num_tokens == mask.sum()
    assert torch.equal(layout.scatter(-tokens, batch), torch.where(mask, -batch, batch))
    rows = layout.to_rows(tokens)
    expected = [row[keep].tolist() for row, keep in zip(batch, mask, strict=True) if keep.any()]
    assert [[x for x in row if x] for row in rows.tolist()] == expected
    assert all(row[: len(want)] == want for row, want in zip(rows.tolist(), expected, strict=True))
    assert torch.equal(layout.to_tokens(rows), tokens)


def test_layout_selects_from_what_is_left():
    layout = TokenLayout.full(2, 3).select(torch.tensor([0, 2, 4, 5]))
    assert layout.positions.tolist() == [0, 2, 4, 5]
    layout = layout.select(torch.tensor([2, 3]))
    assert layout.positions.tolist() == [4, 5]
    assert layout.rows.tolist() == [1]
    assert (layout.num_rows, layout.row_length) == (1, 2)


def test_layout_finds_the_end_of_every_row():
    layout = TokenLayout.from_mask(torch.tensor([[0, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]]).bool())
    past = torch.tensor([[-2, -1]]).expand(3, 2)
    rows = layout.to_rows(torch.tensor([1, 2, 3, 4, 5, 6]))
    window = torch.cat([past, rows], dim=1).unsqueeze(-1)
    assert layout.last_of_rows(window, 2).squeeze(-1).tolist() == [[2, 3], [-1, 4], [5, 6]]
