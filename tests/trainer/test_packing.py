import pytest
import torch

from entrace.analysis.trace import InputError
from entrace.trainer.kernels import attention
from entrace.trainer.kernels.attention import PART_PLACES
from entrace.trainer.kernels.packing import Packing, Sequences, take_rows
from entrace.trainer.model import packing_choice
from tests.slow import slow_after
from tests.trainer.test_policy import ARCHITECTURES, LLAMA_LIKE, load, write_model

PROMPTS = [[5, 6, 7], [5, 6, 7], [8, 9], [5, 6, 7], [8, 9], [10], [5, 6, 7], [8, 9], [5, 6, 7]]
# Some share a prefix, one shares all predictors of another, two are equal, and one prompt is a prefix of others.
RESPONSES = [[11], [12, 13, 14, 15], [16, 17], [12, 13, 19], [20], [21, 22, 23], [12, 13, 14], [16, 17], [12, 26]]
# Sliding windows, and position biases that the model computes from the mask.
NOT_PACKED = {"mistral-sliding", "gemma3-sliding", "bloom-alibi"}


@pytest.fixture
def batch():
    return PROMPTS, [torch.tensor(response) for response in RESPONSES]


def test_every_distinct_prefix_is_packed_once(batch):
    sequences = Sequences.of(*batch)
    packing = Packing.of(sequences)
    slots, own_slots = packing.layout[0]
    whole = [prompt + response[:-1] for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    beginnings = {tuple(row[:length]) for row in whole for length in range(1, len(row) + 1)}
    assert packing.ids.shape[1] == len(beginnings), "a shared prefix is packed more than once"
    found = set()
    for row, own in zip(slots.tolist(), own_slots.tolist(), strict=True):
        used, own = ([slot for slot in some if slot >= 0] for some in (row, own))
        tokens = packing.ids[0, used].tolist()
        assert packing.positions[0, used].tolist() == list(range(len(tokens)))
        assert used[len(used) - len(own) :] == own, "own tokens are not the last ones"
        assert tokens in whole
        found |= {tuple(tokens[:length]) for length in range(1, len(tokens) + 1)}
    assert found == beginnings
    assert own_slots[own_slots >= 0].tolist() == list(range(len(beginnings)))
    lengths = (slots >= 0).sum(1).tolist()
    assert lengths == sorted(lengths)


def test_predictors_of_the_targets(batch):
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
@pytest.mark.parametrize("part_places", slow_after(1, [12, 1, 1 << 12]))
@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_packed_equals_padded_with_gradients(tmp_path, monkeypatch, batch, name, part_places, checkpointing):
    monkeypatch.setitem(PART_PLACES, "cpu", part_places)
    policy = load(write_model(tmp_path, *ARCHITECTURES[name]), gradient_checkpointing=checkpointing)
    assert policy.uses_packing == (name not in NOT_PACKED)
    results = []
    for why_unpacked in (policy.why_unpacked, "compared with padding"):
        policy.why_unpacked = why_unpacked
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
    # The bias of keys does not change attention: its gradient is rounding error, and no scale for differences.
    scale = max(float(grad.abs().max()) for grad in expected_grads.values())
    for key, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[key], rtol=1e-3, atol=1e-5 * scale, msg=key)


def test_packing_is_verified_before_use(tmp_path, monkeypatch):
    """A model that ignores the layout would treat all sequences as one."""
    folder = write_model(tmp_path, "LlamaConfig", LLAMA_LIKE)
    monkeypatch.setattr(attention, "_attend_packed", lambda module, q, k, v, layout, options: q.transpose(1, 2))
    assert load(folder).why_unpacked == "results differ from those with padding"
    message = (
        'policy.attention = "packed": LlamaForCausalLM cannot use sequence packing '
        r"\(results differ from those with padding\); set \"auto\""
    )
    with pytest.raises(InputError, match=f"^{message}$"):
        load(folder, attention="packed")
    monkeypatch.undo()
    assert load(folder, attention="packed").uses_packing
    assert load(folder).uses_packing
    assert load(folder, attention="sdpa").why_unpacked == "policy.attention is not packed"


def test_the_faster_update_is_chosen_by_measurement(tmp_path, monkeypatch, caplog):
    """The choice is made on a GPU; here, both passes run on a CPU."""
    caplog.set_level("INFO", logger="entrace")
    policy = load(write_model(tmp_path, *ARCHITECTURES["llama"]))
    assert all(seconds > 0 for seconds in packing_choice._time_round(policy))
    for padded, packed, reason in ((1.0, 0.5, ""), (1.0, 1.2, "padding is faster, 1 s against 1.2 s")):
        rounds = iter([(padded + 1, packed), (padded, packed + 1), (padded, packed)])
        monkeypatch.setattr(packing_choice, "_time_round", lambda policy, rounds=rounds: next(rounds))
        assert packing_choice.why_padded(policy) == reason
    assert caplog.records[-1].message == "updates: 1 s padded, 1.2 s packed"
    assert all(parameter.grad is None for parameter in policy.model.parameters())

    def fail(policy):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(packing_choice, "_time_round", fail)
    assert packing_choice.why_padded(policy) == "memory ran out while packing was compared with padding"
