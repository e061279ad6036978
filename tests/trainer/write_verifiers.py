"""Write ``tests/fixtures/dumps/verifiers`` with the classes of verifiers.

The file is ``traces.jsonl.zst``.

The embedded policy samples at temperature 0.7, in this environment; the classes write, where verifiers 0.4.0 is
installed. A third of the responses has a second turn, which the user begins::

    python -m tests.trainer.write_verifiers sample samples.jsonl
    pip install verifiers==0.4.0 && python tests/trainer/write_verifiers.py write samples.jsonl traces.jsonl
    zstd -19 traces.jsonl -o tests/fixtures/dumps/verifiers/traces.jsonl.zst
"""

import json
import sys
from pathlib import Path
from unittest.mock import MagicMock

TEMPERATURE = 0.7
PROMPTS, SAMPLES, TURNS_OF = 12, 32, 4
MAX_TOKENS = 40
AGAIN = "Check the answer again."


def sample(path: Path) -> None:
    """Sample responses, and write their tokens and log-probabilities."""
    import torch

    from .trl_runs import dataset, load_policy, teacher_forced

    torch.manual_seed(5)
    torch.set_num_threads(1)
    model = load_policy().eval()
    tokenizer = load_tokenizer()

    def answer(ids, count):
        batch = torch.tensor([ids] * count)
        options = {"do_sample": True, "temperature": TEMPERATURE, "top_k": 0, "max_new_tokens": MAX_TOKENS}
        found = model.generate(batch, attention_mask=torch.ones_like(batch), **options)[:, len(ids) :].tolist()
        return [response[: response.index(1) + 1] if 1 in response else response for response in found]

    def turn(text):
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
        )
        return tokenizer(rendered, add_special_tokens=False)["input_ids"]

    with path.open("w") as file:
        for number, row in enumerate(dataset(PROMPTS)):
            question = row["prompt"][0]["content"]
            prompt = turn(question)
            for response in answer(prompt, SAMPLES):
                turns = [(question, prompt, response)]
                if number < TURNS_OF:
                    context = turn(AGAIN)
                    [second] = answer([*prompt, *response, *context], 1)
                    turns.append((AGAIN, context, second))
                written, before = [], []
                for text, given, ids in turns:
                    before += given
                    logprobs = teacher_forced(model, before, ids, TEMPERATURE)[0].tolist()
                    answered = tokenizer.decode(ids, skip_special_tokens=True)
                    written.append({"text": text, "given": given, "answer": answered, "ids": ids, "logprobs": logprobs})
                    before += ids
                right = f">{row['solution']}<" in written[-1]["answer"]
                file.write(json.dumps({"group": number, "reward": float(right), "turns": written}) + "\n")


def load_tokenizer():
    from transformers import AutoTokenizer

    from .trl_runs import POLICY

    return AutoTokenizer.from_pretrained(POLICY)


def write(samples: Path, out: Path) -> None:
    """Write the samples as episodes of one trace each."""
    # Clients of sandboxes, which records do not need.
    for name in ("prime_sandboxes", "prime_sandboxes.models", "prime_sandboxes.exceptions", "prime_tunnel"):
        sys.modules[name] = MagicMock()
    from verifiers.v1.episode import EnvInfo, GroupInfo, PolicySpan, TrainRunInfo, TrainWorkInfo, WireEpisode
    from verifiers.v1.graph import MessageNode
    from verifiers.v1.trace import ModelCall, Reward, VersionInfo, WireTrace
    from verifiers.v1.types import AssistantMessage, UserMessage

    with out.open("w") as file:
        for number, line in enumerate(samples.open()):
            row = json.loads(line)
            nodes = []
            for turn in row["turns"]:
                parent = len(nodes) - 1 if nodes else None
                given, ids = turn["given"], turn["ids"]
                common = {"timestamp": 0.0}
                user = UserMessage(content=turn["text"])
                nodes.append(
                    MessageNode(parent=parent, message=user, token_ids=given, mask=[False] * len(given), **common)
                )
                said = AssistantMessage(content=turn["answer"])
                nodes.append(
                    MessageNode(
                        parent=len(nodes) - 1,
                        message=said,
                        sampled=True,
                        token_ids=ids,
                        mask=[True] * len(ids),
                        logprobs=turn["logprobs"],
                        **common,
                    )
                )
            finish = "stop" if nodes[-1].token_ids[-1] == 1 else "length"
            call = ModelCall(
                node=len(nodes) - 1, model="m", sampling={"temperature": TEMPERATURE}, finish_reason=finish
            )
            trace = WireTrace(
                id=f"t{number}",
                verifiers=VersionInfo(version="0.4.0"),
                task={"type": "Sums", "data": {"idx": row["group"], "prompt": row["turns"][0]["text"]}},
                agent={"config": {"runtime": {"type": "subprocess"}}, "name": "agent", "trainable": True},
                nodes=nodes,
                calls=[call],
                rewards={"correct": Reward(score=row["reward"])},
                info={"kind": "train"},
            )
            work = TrainWorkInfo(step=1, policy=PolicySpan(start=0, end=0))
            episode = WireEpisode(
                id=f"e{number}",
                env=EnvInfo(id="sums", name="sums"),
                task=trace.task,
                group=GroupInfo(id=f"g{row['group']}"),
                run=TrainRunInfo(id="run-1", work=work),
                ok=True,
                traces=[trace],
            )
            file.write(json.dumps(episode.to_record()) + "\n")


if __name__ == "__main__":
    command, *paths = sys.argv[1:]
    {"sample": sample, "write": write}[command](*map(Path, paths))
