"""What is wrong with a config, in our words: unknown names, other frameworks' names, quotes that are missing."""

import ast
import difflib
import inspect
import re
from collections.abc import Sequence

import gin

from crescendo.experiments.configs.factories import FACTORIES

# What other frameworks call things, and what takes their place; compared in small letters and without underscores.
ELSEWHERE = {
    "(base|initial|init|max|peak)?(lr|learningrate)": "the learning rate is the macro LEARNING_RATE of shipped "
    "configs, else a parameter of the optimizer or its schedule, such as adamw.learning_rate or schedules.linear.peak",
    "(min|final|end)(lr|learningrate)": "a schedule ends at a share of its peak, such as cosine.end_fraction",
    "(lr)?scheduler(type)?|lrschedule|lrdecaystyle": "a schedule stands where a rate does: "
    "adamw.learning_rate = @cosine()",
    "(num|lr)?warmup(steps|iters|iterations|ratio|fraction|epochs)?": "a schedule's warmup is in examples, such as "
    "schedules.linear.warmup",
    "optim|optimizertype|optimizername": "an optimizer is named by train.optimizer, such as @adamw()",
    "(gradient|grad)?accum(ulation)?(steps)?|accumulategradbatches|num(micro)?batches|iterssize": "train.batch_size "
    "is the global batch, which is cut into microbatches by itself; train.max_microbatch_examples bounds them",
    "(train)?(micro|mini)batch(es|size)?(pergpu|perdevice)?|trainmicrobatchsizepergpu": "train.batch_size is the "
    "global batch, which is cut into microbatches by itself; train.max_microbatch_examples bounds them",
    "(per)?(device|gpu|worker|local)(train)?batch(size)?|batch(size)?per(device|gpu|worker)": "train.batch_size is "
    "the global batch, of all devices together, in examples",
    "(global|train|total)?batch(size)?": "the global batch, in examples, is train.batch_size",
    "(num|max|n|total)?(train)?epochs?|passes": "a run's length is train.total_examples, an epoch being as many as the "
    "data have rows: train --dry-run says how often the data are passed over",
    "(max|num|n|total)?(train(ing)?)?(steps|iters|iterations|updates)": "a run's length is train.total_examples, in "
    "examples: steps times the batch size",
    "(eval|val|validation|test)(uation)?(steps|interval|every|freq|frequency|iters)": "held-out rows are evaluated "
    "every train.evaluate_every_examples",
    "(save|checkpoint|ckpt)(ing)?(steps|interval|every|freq|frequency|iters)": "checkpoints are written every "
    "train.checkpoint_every_examples",
    "(log|logging)(steps|interval|every|freq|frequency|everynsteps)": "every step is recorded",
    "(max)?grad(ient)?norm|(grad(ient)?)?clip(ping|grad|gradnorm|norm|val|value|threshold)*": "gradients are clipped "
    "to train.max_gradient_norm",
    "weightdecay|wd": "weight decay is a parameter of the optimizer, such as adamw.weight_decay",
    "fp16|bf16|amp|(mixed)?precision|(torch|compute|param)?dtype": "the dtype of a model's arithmetic is model.dtype",
    "(gradient|activation)checkpointing|checkpointactivations|recompute": "what the backward pass recomputes is "
    "model.remat, such as 'full'",
    "compile|torchcompile|jit": "every step is compiled",
    "(output|work|save|log|checkpoint|exp|experiment)(dir|folder|path)|out(dir)?|(run|exp|experiment)name": "the "
    "run's folder is given by --run, and its name in reports by train.label",
    "resume(from(checkpoint)?)?|ckptpath|loadcheckpoint": "the same command goes on where a run stopped",
    "(pretrained)?modelnameorpath|loadfrom|initfrom": "parameters to begin with are named by train.initialize_from",
    "blocksize|(max)?seq(uence)?len(gth)?|context(length|size|window)|maxlength|maxseqlen|nctx": "the length of rows, "
    "in tokens, is text_data.sequence_length, or the macro SEQUENCE_LENGTH of shipped configs",
    "(dataset|train|data)(path|dir|file|files|name)?|corpus": "text of one's own is named by "
    "text_data.documents = @text_files() and text_files.paths",
    "nlayers?|num(hidden|decoder)?layers|depth": "a decoder's depth is model.layers",
    "nheads?|num(attention)?heads": "a decoder's query heads are model.heads, those of keys and values model.kv_heads",
    "nembd|dmodel|hidden(size|dim)|embed(ding)?dim|dim": "a decoder's width is model.width",
    "(intermediate|ffn?|ffnhidden)(size|dim)|dff|ffndim": "the width of a decoder's feed-forward part is "
    "model.mlp_width",
    "dropout(rate|prob)?|(resid|attn|hidden)dropout(prob)?": "a decoder's dropout is model.dropout",
    "(model|tensor)parallel(ism)?(size)?|tp(size)?": "devices that share each layer are mesh.tensor, with "
    "train.mesh = @mesh()",
    "pipelineparallel(ism)?(size)?|pp(size)?": "devices that share the layers one after the other are mesh.stage, with "
    "train.mesh = @mesh()",
    "pipelineschedule|ppschedule": "a pipeline's schedule is strategy.schedule, with train.strategy = @strategy()",
    "virtual(pipeline(parallel)?|stages?|pp)(size)?|vpp(size)?|numlayerspervirtualpipelinestage": "parts of a stage's "
    "layers are strategy.chunks, with strategy.schedule = 'interleaved' and train.strategy = @strategy()",
    "expert(model)?parallel(ism)?(size)?|ep(size)?": "devices that share the experts are mesh.expert, or any axes of "
    "strategy.experts, with train.mesh = @mesh() and train.strategy = @strategy()",
    "skip(ped|ping)?(stages?|ratio|share)?": "a microbatch goes through one of so many stages with strategy.one_of",
    "zero(stage)?|fsdp|sharding(strategy)?|deepspeed": "what is split over the devices is train.strategy, such as "
    "'fsdp' or 'zero1'",
    "(num|n)?(gpus|devices|procs|processes|nodes)(pernode)?|worldsize": "all devices of the machine are used; several "
    "machines are joined by --hosts",
    "(dataloader)?numworkers|prefetch(factor)?": "rows are read ahead by themselves",
    "(use)?ema(decay)?|averagedecay": "an average of the parameters is evaluated with train.average_examples",
    "reportto|loggers?|(use)?wandb(project)?": 'metrics go to Weights & Biases with train.writers = ["wandb"]',
    "randomseed|rngseed": "the seed is train.seed",
}


def elsewhere(name: str) -> str | None:
    """What takes the place of another framework's name here, as half a sentence; None for names unknown there too.

    >>> elsewhere("per_device_train_batch_size")
    'train.batch_size is the global batch, of all devices together, in examples'
    >>> elsewhere("batch_sise")
    """
    plain = re.sub("[-_]", "", name).lower()
    return next((place for pattern, place in ELSEWHERE.items() if re.fullmatch(pattern, plain)), None)


def nearest(name: str, known: Sequence[str]) -> str:
    """The known names that are nearest, or all of them, to stand behind a complaint.

    >>> nearest("LEARNING_RTE", ["LEARNING_RATE", "TOTAL_EXAMPLES"])
    '; nearest: LEARNING_RATE'
    """
    by_upper = {each.upper(): each for each in known}
    close = [by_upper[each] for each in difflib.get_close_matches(name.upper(), by_upper, n=3, cutoff=0.5)]
    return f"; nearest: {', '.join(close)}" if close else f"; known: {', '.join(known)}" if known else ""


def quoted(statement: str) -> str | None:
    """The statement with its value in the quotes that it lacks; None where they don't help.

    >>> quoted("text_files.paths=[books/*.txt, a.txt]")
    'text_files.paths = ["books/*.txt", "a.txt"]'
    >>> quoted("train.keep_best_checkpoint = true")
    'train.keep_best_checkpoint = True'
    >>> quoted("train.label = 'a")
    """
    name, equals, value = (part.strip() for part in statement.partition("="))
    if not equals or not re.fullmatch(r"[\w./]+", name) or not value or re.search(r"""['"\n]""", value):
        return None
    if value.lower() in ("true", "false", "none", "null"):
        return f"{name} = {'None' if value.lower() == 'null' else value.capitalize()}"
    inside = value[1:-1] if value[0] + value[-1] in ("[]", "()") else None
    words = [value] if inside is None else [word.strip() for word in inside.split(",")]
    if any(re.search(r"[][(){}@%]", word) for word in words):
        return None
    shown = ", ".join(word if _is_literal(word) else f'"{word}"' for word in words)
    return f"{name} = {shown if inside is None else f'[{shown}]'}"


def _is_literal(word: str) -> bool:
    try:
        ast.literal_eval(word)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return False
    return True


def explained(message: str) -> str:
    """Adds the nearest known names, or what takes the place of another framework's, to gin's own words."""
    unknown_factory = re.search(r"No configurable matching (?:reference )?'?@?([\w./]+)", message)
    ambiguous = re.search(r"Ambiguous selector '([\w.]+)', matches \[(.*)\]", message)
    if ambiguous:
        written = [name for name in re.findall(r"[\w.]+", ambiguous.group(2)) if not name.startswith("gin.")]
        return f"{ambiguous.group(1)!r} means several: write {' or '.join(written)}"
    unknown_parameter = re.search(r"Configurable '?([\w.]+)'? doesn't have a parameter named '?(\w+)'?", message)
    if without_value := re.search(r"No bindings specified for '(.*?)/gin\.macro'", message):
        return f"%{without_value[1]} has no value: bind it, {without_value[1]} = VALUE"
    if message.startswith("malformed node"):
        return "a value is no literal: write a number, 'text', a list, None, @NAME() or %MACRO"
    if unknown_factory:
        name = unknown_factory.group(1).split("/")[-1]
        return f"unknown name {name!r}{nearest(name.split('.')[-1], _known_names())}"
    if unknown_parameter:
        name, parameter = unknown_parameter.groups()
        known = list(inspect.signature(gin.get_configurable(name)).parameters)
        ours = parameter.replace("_", "") in [each.replace("_", "") for each in known]
        place = None if ours else elsewhere(parameter)
        instead = f": {place}" if place else nearest(parameter, known)
        return f"{name.split('.')[-1]} has no parameter {parameter!r}{instead}"
    return message


def _known_names() -> list[str]:
    return sorted({name for factories in FACTORIES.values() for name in factories} | {"train"})
