import pytest
import torch

from entrace.analysis.trace import InputError
from entrace.trainer.kernels import attention
from entrace.trainer.kernels.attention import PART_PLACES
from entrace.trainer.kernels.packing import Packing, Sequences, take_rows
from tests.trainer.test_policy import ARCHITECTURES, LLAMA_LIKE, load, write_model

PROMPTS = [[5, 6, 7], [5, 6, 7], [8, 9], [5, 6, 7], [8, 9], [10], [5, 6, 7], [8, 9], [5, 6, 7]]
# Some agree for a while, one with all that is read of another, two whole, and one with the prompt of others.
RESPONSES = [[11], [12, 13, 14, 15], [16, 17], [12, 13, 19], [20], [21, 22, 23], [12, 13, 14], [16, 17], [12, 26]]
# Layers that look back a limited way, positions that are counted by the model, experts that see all tokens, and so on.
NOT_PACKED = {"mistral-sliding", "gemma3-sliding", "bloom-alibi"}


@pytest.fixture
def batch():
    return PROMPTS, [torch.tensor(response) for response in RESPONSES]


def test_every_token_is_read_once_and_stands_where_it_should(batch):
    sequences = Sequences.of(*batch)
    packing = Packing.of(sequences)
    slots, read_here = packing.layout[0]
    whole = [prompt + response[:-1] for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    beginnings = {tuple(row[:length]) for row in whole for length in range(1, len(row) + 1)}
    assert packing.ids.shape[1] == len(beginnings), "what several begin with is read once"
    found = set()
    for row, own in zip(slots.tolist(), read_here.tolist(), strict=True):
        used, own = ([slot for slot in some if slot >= 0] for some in (row, own))
        tokens = packing.ids[0, used].tolist()
        assert packing.positions[0, used].tolist() == list(range(len(tokens)))
        assert used[len(used) - len(own) :] == own, "what is read here stands last"
        assert tokens in whole
        found |= {tuple(tokens[:length]) for length in range(1, len(tokens) + 1)}
    assert found == beginnings
    assert read_here[read_here >= 0].tolist() == list(range(len(beginnings)))
    lengths = (slots >= 0).sum(1).tolist()
    assert lengths == sorted(lengths)


def test_what_predicts_the_targets(batch):
    sequences = Sequences.of(*batch)
    packing = Packing.of(sequences)
    assert sequences.targets.tolist() == [token for response in RESPONSES for token in response]
    before = [token for prompt, response in zip(*batch, strict=True) for token in [prompt[-1], *response[:-1].tolist()]]
    assert packing.ids[0, packing.predictors].tolist() == before
    assert sequences.ids[sequences.predicts].tolist() == before


def test_take_rows_equals_an_index_with_its_gradient():
    index = torch.tensor([[0, 2, 2], [4, 0, 2]])
    leaves = [torch.arange(30.0).view(5, 2, 3).requires_grad_() for _ in range(2)]
    found, expected = take_rows(leaves[0], index), leaves[1][index]
    assert torch.equal(found, expected)
    for values in (found, expected):
        values.square().sum().backward()
    assert torch.equal(leaves[0].grad, leaves[1].grad)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("part_places", [1, 12, 1 << 12])
@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_packed_equals_padded_with_gradients(tmp_path, monkeypatch, batch, name, part_places, checkpointing):
    monkeypatch.setitem(PART_PLACES, "cpu", part_places)
    policy = load(write_model(tmp_path, *ARCHITECTURES[name]), gradient_checkpointing=checkpointing)
    assert policy.uses_packing == (name not in NOT_PACKED)
    results = []
    for packs in (policy.uses_packing, False):
        policy.uses_packing = packs
        hidden, targets, index = policy.forward_unique(*batch)
        hidden, targets = hidden[index], targets[index]
        policy.model.zero_grad()
        (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
        grads = {name: p.grad for name, p in policy.model.named_parameters() if p.grad is not None}
        results.append((hidden, targets, grads))
    (hidden, targets, grads), (expected, expected_targets, expected_grads) = results
    assert torch.equal(targets, expected_targets)
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)
    assert grads.keys() == expected_grads.keys()
    # A key's bias moves no attention: its gradient is rounding, and nothing to measure differences by.
    scale = max(float(grad.abs().max()) for grad in expected_grads.values())
    for key, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[key], rtol=1e-3, atol=1e-5 * scale, msg=key)


def test_packing_is_not_trusted_but_tried(tmp_path, monkeypatch):
    """A model that does not pass the layout on to its attention would read all sequences as one."""
    folder = write_model(tmp_path, "LlamaConfig", LLAMA_LIKE)
    monkeypatch.setattr(attention, "_attend_packed", lambda module, q, k, v, layout, options: q.transpose(1, 2))
    assert not load(folder).uses_packing
    message = 'policy.attention = "packed": LlamaForCausalLM cannot read packed sequences; set "auto"'
    with pytest.raises(InputError, match=f"^{message}$"):
        load(folder, attention="packed")
    monkeypatch.undo()
    assert load(folder, attention="packed").uses_packing
    assert load(folder).uses_packing
    assert not load(folder, attention="sdpa").uses_packing
