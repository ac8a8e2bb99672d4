"""The model card of a run (`README.md`): origin, training settings, results, cost, how to load it.

All facts come from the trainer and the run's records; the template is `model_card.md`. The card is
written with every checkpoint and with the final model, and replaces TRL's card. Left out: a
license, which depends on those of the student and the teacher.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from effopd.common.host_values import name_of
from effopd.common.schedules import reads_warm_up
from effopd.common.versions import versions
from effopd.runs.lines import first_to_last, kept_text, net_seconds, percent, searches_text
from effopd.runs.records import CONFIG, read_evaluations, read_searches, read_steps
from effopd.tasks.builtin_models import spoken_name
from effopd.tasks.load import instruction

TEMPLATE = Path(__file__).with_name("model_card.md")
#: Task settings that are needed to reproduce a result; listed if they are not defaults.
_TASK = (
    "task_args",
    "eval_task",
    "eval_task_args",
    "verifier",
    "prompt_suffix",
    "system_prompt",
    "as_chat",
    "max_prompt_length",
)
_DIVERGENCES = {1.0: "reverse KL(student ‖ teacher)", 0.0: "forward KL(teacher ‖ student)"}


@dataclass(frozen=True)
class LookAhead:
    """Look-ahead facts for the card: strategy, its description, learning-rate adaptation."""

    strategy: str
    text: str
    adapts_learning_rate: bool


def _several(teachers: Any, trainer: Any) -> str:
    """Several teachers with their labels; "" with one."""
    if teachers is None:
        return ""
    names = {
        label: source if isinstance(source, str) else trainer.model_id(source)
        for label, source in teachers.sources.items()
    }
    return ", ".join(f"{label}: {_shown(name)}" for label, name in names.items())


def model_card(
    trainer: Any,
    name: str,
    datasets: str | None = None,
    tags: Iterable[str] = (),
    look_ahead: LookAhead | None = None,
) -> ModelCard:
    """The card of a run in its current state.

    Args:
        trainer: a `RunMixin` trainer.
        name: model name, the card's title.
        datasets: name of the dataset in the metadata.
        tags: extra tags in the metadata.
        look_ahead: the run's look-ahead; `None`: it has none.
    """
    teacher = getattr(trainer, "teacher_model", None)
    stored = getattr(trainer, "teacher_name", "")  # of stored rollouts, or at a server; not loaded
    several = _several(getattr(trainer, "teachers", None), trainer)
    taught = bool(stored or several or teacher is not None)
    named = getattr(trainer.args, "teacher_model_name_or_path", None)
    student, adapter = trainer.model_id(trainer.model), getattr(_bare(trainer), "peft_config", None)
    packages = versions() | (versions(("peft",)) if adapter else {})
    packages = {name: version for name, version in packages.items() if version != "not installed"}
    tracked = _trackers(trainer)
    data = ModelCardData(
        base_model=student if is_hub_id(student) else None,
        datasets=datasets,
        library_name="peft" if adapter else "transformers",
        model_name=name,
        pipeline_tag="text-generation",
        tags=sorted(
            {"generated_from_trainer", *trainer.card_tags, *tags} | {f"trackio:{u}" for u in tracked[:1] if u}
        ),
    )
    facts = [
        ("student", _shown(student)),
        ("teacher", several or (_shown(stored or named or trainer.model_id(teacher)) if taught else "")),
        ("task", f"`{trainer.task_name}`" if trainer.task_name else ""),
        *_task_facts(trainer),
        ("objective", objective(trainer.args, trainer.method_name)),
        ("strategy", _strategy(look_ahead) if taught else ""),
        ("trained", _trained(adapter)),
        ("steps", _steps(trainer)),
        ("learning rate", _learning_rate(trainer, look_ahead)),
        ("seed", str(trainer.args.seed)),
        ("tracked at", ", ".join(url for url in tracked if url)),
    ]
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        student=dict(facts)["student"],
        teacher=dict(facts)["teacher"],
        offline=bool(getattr(trainer.args, "offline", False)),
        method=_method(trainer.args, trainer.method_name),
        facts=[(label, value.replace("|", "\\|")) for label, value in facts if value],
        whole=(trainer.run_dir.root / CONFIG).is_file(),
        results=_results(trainer),
        snippet=snippet(trainer, student, adapter=bool(adapter)),
        versions=packages,
        citation=trainer.citation,
    )


def _task_facts(trainer: Any) -> list[tuple[str, str]]:
    """Settings of prompts and grading that are not defaults."""
    values = {name: value for name, value in _settings(trainer).items() if name in _TASK and value not in (None, {})}
    if trainer.args.chat_template_kwargs:
        values["chat_template_kwargs"] = trainer.args.chat_template_kwargs
    if values.pop("as_chat", True) is False:
        values["as_chat"] = False
    return [(name, f"`{json.dumps(value, ensure_ascii=False)}`") for name, value in values.items()]


def _settings(trainer: Any) -> dict[str, Any]:
    """`config.yaml` of a run started by a command; empty for a trainer used from Python."""
    return yaml.safe_load(trainer.run_dir.settings or "") or {}


def objective(args: Any, method: str) -> str:
    """The training objective in one line."""
    if not hasattr(args, "lambda_extrapolation"):
        overlong = f", the last {percent(args.overlong_cache)} of the length penalized" if args.overlong_cache else ""
        kl, weight = "KL to the initial model", f"{args.beta:g}"
        if hasattr(args, "beta_decay"):
            kl = f"exact KL to {_shown(args.teacher_model_name_or_path or '')}"
            weight += f", {args.beta_decay:g} less per step down to {args.beta_min:g}" if args.beta_decay else ""
        return f"{_method(args, method)}: reward 1 for a verified answer{overlong}; {kl} weighted {weight}"
    text = _loss(args)
    if args.token_mask != "none":
        text += "; without the first special tokens of an answer"
    if args.lambda_extrapolation != 1:
        text += f"; to λ·teacher + (1−λ)·reference, λ = {args.lambda_extrapolation:g}"
        text += f", reference {_shown(args.reference_model_name_or_path or '')}"
    if getattr(args, "offline", False):
        text += "; offline on stored answers"
        text += f", advantage clipped at {args.advantage_clip:g} nats" if args.loss_type == "sampled" else ""
        text += ", without the mean bias of the teacher by token and place" if args.residualize else ""
    if getattr(args, "curriculum", "none") != "none":
        text += f"; {args.stages} stages by {args.curriculum}, {args.curriculum_order.replace('_', ' ')}"
        text += ", a teacher each" if args.curriculum_teachers else ""
    return text + (f"; rollout horizon {args.rollout_horizon}" if args.rollout_horizon != "full" else "")


def _loss(args: Any) -> str:
    """The loss of a distillation run in a few words."""
    if args.loss_type == "sampled":
        text = "reverse KL(student ‖ teacher), policy gradient on the sampled token"
        if args.samples_per_prefix > 1:
            text += f" and {args.samples_per_prefix - 1} more from the student"
        if args.baseline != "none":
            top = f" on the student's top {args.baseline_top_k}" if args.baseline_top_k else ""
            text += f", baseline '{args.baseline}'{top}"
        return text
    if args.loss_type == "discord":
        return (
            "cross-entropy on correct answers of the teacher, token weights sigmoid of the log-ratio "
            f"student/teacher, temperature {args.discord_temperature:g} (DisCorD)"
        )
    if args.loss_type == "teacher_top_k":
        return f"reverse KL(student ‖ teacher), renormalized on the teacher's top {args.teacher_top_k} tokens"
    if args.loss_type == "negative_advantage":
        share = percent(args.lowest_logp_share)
        size = f"fixed advantage −{args.negative_advantage:g}"
        if args.entropy_advantage:
            size = f"advantage from −{args.negative_advantage:g} to −{2 * args.negative_advantage:g} by entropy (OPSA)"
        return f"{size} on the least likely {share} of tokens, without a teacher"
    divergence = _DIVERGENCES.get(args.beta, f"Jensen–Shannon divergence, β = {args.beta:g}")
    scope = "exact over the vocabulary"
    if getattr(args, "teacher_server", None):
        scope = f"of the served teacher's top {args.teacher_top_k} tokens and one outcome for the rest"
    return f"{divergence}, {scope}" + (", divided by β(1−β)" if args.normalize_beta else "")


def snippet(trainer: Any, student: str, *, adapter: bool) -> str:
    """Python code that loads the model and samples an answer with the prompt format of training."""
    args, tokenizer = trainer.args, trainer.processing_class
    extra = ", trust_remote_code=True" if getattr(args, "trust_remote_code", False) else ""
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    if adapter:
        lines.insert(0, "from peft import PeftModel")
    folder = Path(student).is_dir() if student else False
    base = repr(str(Path(student).resolve()) if folder else student)
    if (shown := spoken_name(student)) != student:
        base = f"resolve_model({shown!r})"
        lines += ["from effopd.tasks.builtin_models import resolve_model"] if adapter else []
    lines += ["", f"path = {str(trainer.run_dir.root)!r}  # this folder, or the Hub id of its copy"]
    lines.append(f"tokenizer = AutoTokenizer.from_pretrained(path{extra})")
    if adapter and student:
        revision = next(iter(_bare(trainer).peft_config.values())).revision
        at = f", revision={revision!r}" if revision else ""
        lines.append(f"base = AutoModelForCausalLM.from_pretrained({base}{at}{extra})")
    elif adapter:
        lines.append("base = ...  # the model object passed to the trainer")
    lines += [
        "model = PeftModel.from_pretrained(base, path)"
        if adapter
        else f"model = AutoModelForCausalLM.from_pretrained(path{extra})",
        "",
    ]
    lines += _question(trainer, tokenizer)
    return "\n".join(
        [
            *lines,
            f"output = model.generate(**inputs, max_new_tokens={args.max_completion_length}, do_sample=True)",
            'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
        ]
    )


def _question(trainer: Any, tokenizer: Any) -> list[str]:
    """Lines that write a question with training's system message, instruction and template."""
    settings, args = _settings(trainer), trainer.args
    suffix = instruction(settings["task"], settings.get("prompt_suffix")) if settings.get("task") else ""
    after = f" + {suffix!r}" if suffix else ""
    if not _chats(trainer.train_dataset, tokenizer):
        return [f'inputs = tokenizer("Your prompt"{after}, return_tensors="pt")']
    template = "".join(f", {key}={value!r}" for key, value in (args.chat_template_kwargs or {}).items())
    messages = [f'{{"role": "user", "content": "Your question"{after}}}']
    if settings.get("system_prompt"):
        messages.insert(0, f'{{"role": "system", "content": {settings["system_prompt"]!r}}}')
    return [
        f"messages = [{', '.join(messages)}]",
        "inputs = tokenizer.apply_chat_template(",
        f'    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"{template}',
        ")",
    ]


def is_hub_id(name: str) -> bool:
    """Whether a model that was loaded as `name` came from the Hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return bool(name) and not Path(name).exists()


def _results(trainer: Any) -> list[str]:
    root = trainer.run_dir.root
    evaluations, searches = read_evaluations(root), read_searches(root)
    rewards = [(record.step, record.reward) for record in read_steps(root) if record.reward is not None]
    lines = []
    if trainer.kept is not None:  # leave out evaluations of later models
        lines.append(f"Trained for {trainer.state.global_step} steps; this is the model of {kept_text(trainer.kept)}.")
        evaluations = [record for record in evaluations if record.step <= trainer.kept.step]
    if evaluations:
        first, last = evaluations[0], evaluations[-1]
        prompts = f" ({len(trainer.eval_task)} prompts)" if trainer.eval_task is not None else ""
        when = f"from step {first.step} to" if len(evaluations) > 1 else "at"
        lines.append(f"Held out{prompts}, {when} step {last.step}: {'; '.join(first_to_last(evaluations))}.")
        lines.append("KL: exact reverse KL to the teacher, nats per token, ± standard error." * (last.kl is not None))
        lines.append(
            f"Accuracy: sampled at temperature {trainer.args.eval_temperature:g}, 95 % interval."
            * (last.accuracy is not None)
        )
    else:
        lines.append("Not evaluated on held-out prompts.")
    if rewards:
        lines.append(
            "Mean training reward: " + ", ".join(f"{r:.3f} in step {s}" for s, r in (rewards[0], rewards[-1])) + "."
        )
    costs = trainer.costs
    if costs.net_seconds is not None:
        clock = "of wall-clock time" if trainer.args.cost_clock == "wall" else "of CPU time"
        tokens = f"{costs.net_generated_tokens:,} sampled tokens"
        lines.append(f"Cost without evaluation: {net_seconds(costs)} {clock}, {tokens}.")
    if searches:
        lines.append(f"Look-ahead: {searches_text(searches)}.")
    return [line for line in lines if line]


def _strategy(look_ahead: LookAhead | None) -> str:
    if look_ahead is None:
        return "none: plain on-policy distillation"
    return f"`{look_ahead.strategy}`: {look_ahead.text}"


def _trained(adapter: Any) -> str:
    if not adapter:
        return "all weights"
    config = next(iter(adapter.values()))
    rank = getattr(config, "r", None)
    kind = {"LORA": "LoRA"}.get(name := getattr(config.peft_type, "value", str(config.peft_type)), name)
    return f"{kind} adapter" + (f" of rank {rank}" if rank else "")


def _steps(trainer: Any) -> str:
    args, state = trainer.args, trainer.state
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    kept = "" if trainer.kept is None else f"; the model is that of step {trainer.kept.step}"
    return f"{state.global_step} of {state.max_steps}, {batch} answers each{kept}"


def _learning_rate(trainer: Any, look_ahead: LookAhead | None) -> str:
    args = trainer.args
    text = f"{args.learning_rate:g}, {name_of(args.lr_scheduler_type)}"
    if args.warmup_steps and reads_warm_up(args):
        text += f", warm-up {args.warmup_steps:g}"
    if look_ahead is None or not look_ahead.adapts_learning_rate:
        return text
    rates = [record.learning_rate for record in read_steps(trainer.run_dir.root) if record.learning_rate]
    return text + "; adapted by the look-ahead" + (f", {rates[-1]:.2g} in the last step" if rates else "")


def _method(args: Any, method: str) -> str:
    algorithm = getattr(args, "algorithm", "")
    return "dGRPO" if algorithm.startswith("dgrpo") else "DAPO" if algorithm == "dapo" else method


def _bare(trainer: Any) -> Any:
    return trainer.accelerator.unwrap_model(trainer.model)


def _shown(name: str) -> str:
    return f"`{spoken_name(name)}`" if name else "a model object without a name"


def _chats(dataset: Any, tokenizer: Any) -> bool:
    """Whether prompts are messages; for a stream, whether the tokenizer has a chat template."""
    if hasattr(dataset, "__len__") and len(dataset):
        return isinstance(dataset[0].get("prompt"), list)
    return getattr(tokenizer, "chat_template", None) is not None


def _trackers(trainer: Any) -> tuple[str | None, str | None, str | None]:
    """URLs of the run at Trackio, Comet and Weights & Biases; `None`: not tracked."""
    run = getattr(sys.modules.get("wandb"), "run", None)
    return *trainer.tracker_urls(), getattr(run, "url", None)
