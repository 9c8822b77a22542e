"""What a fine-tuned language model learns of prompts and answers, and the answers that it generates."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.engines.pool import run_ranks
from tests.training.finetuning import command_line, finetune, make_checkpoints, write_jsonl
from tests.training.runs import deepspeed_config

pytestmark = pytest.mark.slow

SUMS = [(3, 4), (5, 9), (2, 2), (8, 7), (1, 6), (9, 9), (4, 8), (7, 3), (6, 5), (8, 0)]
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def sums():
    """Questions and answers as those of GSM8K."""
    return [{"question": f"{a} and {b}?", "answer": f"{a}+{b}\n#### {a + b}"} for a, b in SUMS]


def arguments(folder, output, *more, zero_stage=2, epochs=1, **config):
    settings = deepspeed_config(zero_stage=zero_stage, **config)
    settings |= {"train_batch_size": 10, "train_micro_batch_size_per_gpu": 5}
    settings["optimizer"]["params"]["update_proj_gap"] = 50
    data = str(folder / "sums.jsonl")
    return command_line(
        folder,
        output,
        *("--task", "gsm8k", "--data", data, "--validation", data, "--max-length", "64", "--max-new-tokens", "12"),
        *("--warmup", "0.05", "--eval-interval", "0", *more),
        config=settings,
        epochs=epochs,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint that has memorised ten answers."""
    folder = tmp_path_factory.mktemp("generation")
    make_checkpoints(folder)
    write_jsonl(folder / "sums.jsonl", sums())
    write_jsonl(folder / "eleven.jsonl", [*sums(), {"question": "3 and 4?", "answer": "3+4\n#### 8"}])
    (result,) = run_ranks(1, finetune, arguments(folder, "memory", "--lr", "0.03", epochs=150))
    assert result["best"] == {"metric": "exact_match", "value": 1.0, "step": 150}
    return folder


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_ten_memorised_answers_are_generated_exactly(folder, ranks, zero_stage):
    memory = ("--model", str(folder / "memory" / "export"), "--lr", "1e-6")
    results = run_ranks(ranks, finetune, arguments(folder, f"again{ranks}{zero_stage}", *memory, zero_stage=zero_stage))
    for result in results:
        assert result["best"] == {"metric": "exact_match", "value": 1.0, "step": 1}
        assert result["records"][-1]["eval_exact_match"] == 1.0


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_a_wrong_answer_counts_though_the_ranks_have_different_numbers_of_batches(folder, zero_stage):
    """Rank 0 has six of the eleven questions, in two batches, and rank 1 has five, in one."""
    more = ("--model", str(folder / "memory" / "export"), "--lr", "1e-6", "--validation", str(folder / "eleven.jsonl"))
    results = run_ranks(2, finetune, arguments(folder, f"eleven{zero_stage}", *more, zero_stage=zero_stage))
    assert [result["records"][-1]["eval_exact_match"] for result in results] == [pytest.approx(10 / 11)] * 2


KINDS = {
    "lora": ({"type": "AdamW", "params": {"lr": 1e-6, "torch_adam": True}}, ("--lora-rank", "2")),
    "adapter": ({"type": "GradNormLoRP", "params": {"rank": 2, "parametrization": "adapter", "adapter_rank": 4}}, ()),
    "ascent": ({"type": "Lorenza", "params": {"rank": 4}}, ()),
}


@pytest.mark.parametrize(("kind", "zero_stage"), [("lora", 3), ("adapter", 2), ("ascent", 3)])
def test_models_with_adapters_generate_too(folder, kind, zero_stage):
    optimizer, flags = KINDS[kind]
    more = ("--model", str(folder / "memory" / "export"), "--lr", "1e-6", *flags)
    command = arguments(folder, kind, *more, zero_stage=zero_stage)
    config = deepspeed_config(zero_stage=zero_stage) | {"train_batch_size": 10, "train_micro_batch_size_per_gpu": 5}
    (folder / f"{kind}.json").write_text(json.dumps(config | {"optimizer": optimizer}))
    for result in run_ranks(2, finetune, command):
        assert result["records"][-1]["eval_exact_match"] == 1.0


def losses_by_hand(model, tokenizer, pairs, end):
    """-log p of every token of the answers and of the token that ends them, each after all that precedes it."""
    found = []
    for prompt, completion in pairs:
        before = tokenizer(prompt, add_special_tokens=False).input_ids
        answer = tokenizer(completion, add_special_tokens=False).input_ids + end
        with torch.no_grad():
            logits = model(torch.tensor([before + answer])).logits[0].double()
        for place, token in enumerate(answer, len(before)):
            found.append(torch.logsumexp(logits[place - 1], 0) - logits[place - 1, token])
    return found


def test_the_loss_is_that_of_the_answers_alone(folder):
    """Of a first step by hand, and of the evaluation after it; on two ranks, in micro-batches of unequal lengths."""
    rows = [
        {"instruction": f"Say {'so ' * n}{n}", "input": "loud" * (n % 2), "output": "ok " * (n % 4 + 1)}
        for n in range(8)
    ]
    write_jsonl(folder / "say.jsonl", rows)
    template = {"prompt": ["{instruction} ({input}): ", "{instruction}: "], "completion": "{output}!"}
    (folder / "template.json").write_text(json.dumps(template))
    config = deepspeed_config(zero_stage=1)
    data = ("--data", str(folder / "say.jsonl"), "--validation", str(folder / "say.jsonl"))
    flags = ("--task", "causal-lm", "--template", str(folder / "template.json"), "--max-length", "64", *data)
    result = run_ranks(2, finetune, command_line(folder, "hand", *flags, config=config, epochs=1))[0]
    tokenizer = AutoTokenizer.from_pretrained(folder / "llama")
    prompts = [f"{row['instruction']} (loud): " if row["input"] else f"{row['instruction']}: " for row in rows]
    pairs = [(prompt, f"{row['output']}!") for prompt, row in zip(prompts, rows, strict=True)]
    (record,) = result["records"]
    for model, key in (("llama", "loss"), ("hand/export", "eval_loss")):
        by_hand = losses_by_hand(
            AutoModelForCausalLM.from_pretrained(folder / model), tokenizer, pairs, [tokenizer.eos_token_id]
        )
        # One mean over all tokens of the step: fp32 sums in another order.
        assert record[key] == pytest.approx(float(sum(by_hand) / len(by_hand)), rel=1e-5), key


def chat_checkpoint(folder):
    path = folder / "chat"
    shutil.copytree(folder / "llama", path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|end|>"]})
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(path)
    return tokenizer


def test_a_chat_template_frames_question_and_answer(folder):
    """The answer ends with the template's own token, which ends the generation too; the newline after it is learnt."""
    tokenizer = chat_checkpoint(folder)
    more = ("--model", str(folder / "chat"), "--chat", "--lr", "0.03")
    (result,) = run_ranks(1, finetune, arguments(folder, "chatting", *more, epochs=150))
    assert result["records"][-1]["eval_exact_match"] == 1.0
    exported = AutoTokenizer.from_pretrained(folder / "chatting" / "best")
    model = AutoModelForCausalLM.from_pretrained(folder / "chatting" / "best")
    message = [{"role": "user", "content": "Question: 8 and 7?\nAnswer:"}]
    ids = exported.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    found = model.generate(**ids, max_new_tokens=16, do_sample=False, eos_token_id=end)
    assert exported.decode(found[0, ids["input_ids"].shape[1] :]) == " 8+7\n#### 15<|end|>"


FORMS = {
    "mmlu": (
        {"question": "Which is {n}?", "choices": ["{n}", "x", "y", "z"], "answer": 2, "subject": "numbers"},
        ("Which is {n}?\nA. {n}\nB. x\nC. y\nD. z\nAnswer:", " C"),
    ),
    "commonsense": (
        {"instruction": "Is {n}?", "input": "", "output": "the correct answer is option2", "answer": "option2"},
        (
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
            "\n\n### Instruction:\nIs {n}?\n\n### Response:\n",
            "the correct answer is option2",
        ),
    ),
}


@pytest.mark.parametrize("task", FORMS)
def test_a_task_by_name_reads_files_of_its_form(folder, task):
    """One command: the model learns the one answer that all rows have."""
    form, (prompt, completion) = FORMS[task]
    fill = json.dumps(form).replace
    write_jsonl(folder / f"{task}.jsonl", [json.loads(fill("{n}", str(n))) for n in range(16)])
    data = ("--data", str(folder / f"{task}.jsonl"), "--validation", str(folder / f"{task}.jsonl"))
    large = {"max_position_embeddings": 256}
    config = json.loads((folder / "model.json").read_text()) | large
    (folder / "long.json").write_text(json.dumps(config))
    flags = ("--task", task, "--model", str(folder / "long.json"), "--tokenizer", "bytes", *data)
    more = (*flags, "--max-length", "220", "--lr", "0.02", "--warmup", "3", "--eval-interval", "0")
    (result,) = run_ranks(1, finetune, command_line(folder, task, *more, config=deepspeed_config("AdamW"), epochs=40))
    assert result["best"] == {"metric": "exact_match", "value": 1.0, "step": 80}
    tokenizer = AutoTokenizer.from_pretrained(folder / task / "best")
    model = AutoModelForCausalLM.from_pretrained(folder / task / "best")
    by_hand = losses_by_hand(
        model, tokenizer, [(prompt.replace("{n}", str(n)), completion) for n in range(16)], [tokenizer.eos_token_id]
    )
    # To rounding: losses near zero are differences of logits near ten.
    assert result["records"][-1]["eval_loss"] == pytest.approx(float(sum(by_hand) / len(by_hand)), rel=1e-3, abs=1e-6)
