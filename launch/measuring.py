"""The commands that decode with drafters: `eval`, `generate`, `verify`, `sweep`, `tune-tree`, `report`."""

from pathlib import Path
from typing import Annotated

import typer

from draftsmith.launch.program import (
    Batches,
    Drafter,
    Dtype,
    Limit,
    NewTokens,
    Output,
    Seed,
    Temperature,
    Temperatures,
    TemplateArgs,
    app,
    say,
    template_variables,
)

Threads = Annotated[
    int, typer.Option(min=1, help="on a CPU; default: OMP_NUM_THREADS, or one or all, by a short trial")
]

Datastore = Annotated[str, typer.Option(help="directory of `draftsmith datastore build`, for methods that retrieve")]


@app.command(name="eval")
def evaluate(
    methods: Annotated[
        list[str],
        typer.Argument(
            help="drafter directories ([NAME=]DIR or bundled:PATH), howl:DRAFTER, reader[:DRAFTER|:stand], "
            "cascade:[N:]MIDDLE+METHOD, select:METHOD,METHOD[:RULE][:lasting], "
            "stand[:deterministic|:sequential], recycling, suffix, lookup, hf-generate, hf-lookup, hf-assisted; "
            "plain decoding is always there"
        ),
    ],
    suite: Annotated[list[str], typer.Option(help="[NAME=]FILE: JSONL, JSON, Parquet or bundled:PATH")] = [
        "bundled:prompts/code.jsonl"
    ],
    target: Annotated[str, typer.Option(help="default: the one that the drafters name")] = None,
    assistant: Annotated[str, typer.Option(help="draft model of hf-assisted")] = "bundled:targets/code-mini",
    output: Output = "runs/eval",
    tree: Annotated[
        str, typer.Option(help="tree to time: auto, chain:DEPTH, dynamic:TOP_KxDEPTHxSIZE, eagle or FILE.json")
    ] = "auto",
    temperature: Temperatures = [0.0, 0.6, 1.0],
    time_at: Annotated[list[float], typer.Option(help="temperatures at which speed is measured; default: all")] = None,
    batch: Batches = [1],
    max_new_tokens: NewTokens = 128,
    limit: Limit = None,
    skip_long: Annotated[bool, typer.Option(help="leave out prompts that do not fit the context")] = False,
    seed: Seed = 0,
    threads: Threads = None,
    dtype: Dtype = None,
    trajectories: Annotated[
        int,
        typer.Option(min=1, help="instead: so many samples of each prompt, by trajectory; what drafters learn stays"),
    ] = None,
    datastore: Datastore = None,
    template_arg: TemplateArgs = [],
):
    """Measure drafters and baselines: acceptance length, prediction, speed, losslessness. Writes OUTPUT/result.json; a
    killed one goes on.
    """
    from draftsmith.launch.measurement import Request, measure
    from draftsmith.launch.trajectories import scale

    request = Request(
        methods,
        Path(output),
        tuple(suite),
        target,
        assistant,
        tree,
        tuple(temperature),
        tuple(time_at) if time_at else None,
        tuple(batch),
        max_new_tokens,
        limit,
        skip_long,
        seed,
        threads,
        dtype,
        datastore,
        template_variables(template_arg),
    )
    measure(request, say) if trajectories is None else scale(request, trajectories, say)


@app.command()
def generate(
    method: Annotated[str, typer.Argument(help="what `draftsmith eval` takes: a drafter, howl:DRAFTER, suffix, ...")],
    prompt: Annotated[
        str, typer.Argument(help="default: what is piped in, or a chat where the input is a terminal")
    ] = None,
    target: Annotated[str, typer.Option(help="default: the one that the drafter names")] = None,
    assistant: Annotated[str, typer.Option(help="draft model of hf-assisted")] = "bundled:targets/code-mini",
    tree: Annotated[
        str, typer.Option(help="default: dynamic:3x4x10 on a CPU, dynamic:10x7x60 on an accelerator")
    ] = None,
    temperature: Temperature = 0.0,
    max_new_tokens: NewTokens = 256,
    seed: Seed = 0,
    system: Annotated[str, typer.Option(help="system message")] = None,
    image: Annotated[list[Path], typer.Option(help="pictures of the first message, for targets that see")] = [],
    compare: Annotated[
        bool, typer.Option(help="decode plainly too: speedup, and whether the texts are identical")
    ] = True,
    dtype: Dtype = None,
    datastore: Datastore = None,
    template_arg: TemplateArgs = [],
):
    """Answer a prompt, or chat: the text as it comes, a new colour with every pass of the target; then the acceptance
    length, and plain decoding beside it.
    """
    from draftsmith.launch.generate import Request
    from draftsmith.launch.generate import generate as run

    run(
        Request(
            method,
            prompt,
            target,
            assistant,
            tree,
            temperature,
            max_new_tokens,
            seed,
            system,
            tuple(image),
            compare,
            dtype,
            datastore,
            template_variables(template_arg),
        )
    )


@app.command()
def verify(
    methods: Annotated[
        list[str],
        typer.Argument(
            help="drafter directories ([NAME=]DIR or bundled:PATH), howl:DRAFTER, reader[:METHOD], stand[:MODE], "
            "cascade:[N:]MIDDLE+METHOD, select:METHOD,METHOD[:RULE][:lasting], recycling, suffix, lookup"
        ),
    ],
    suite: Annotated[str, typer.Option(help="JSONL, JSON, Parquet or bundled:PATH")] = "bundled:prompts/code.jsonl",
    target: Annotated[list[str], typer.Option(help="default: the one that the drafters name")] = None,
    dtype: Annotated[list[str], typer.Option(help="fp32, bf16, fp16; identity is claimed in fp32")] = ["fp32"],
    tree: Annotated[list[str], typer.Option(help="chain:DEPTH, dynamic:TOP_KxDEPTHxSIZE, eagle or FILE.json")] = [
        "chain:5",
        "dynamic:4x4x12",
        "dynamic:10x7x60",
    ],
    batch: Batches = [1, 8],
    temperature: Temperatures = [0.0, 1.0],
    max_new_tokens: NewTokens = 64,
    limit: Limit = 16,
    seed: Seed = 0,
    output: Output = "runs/verify",
    datastore: Datastore = None,
    template_arg: TemplateArgs = [],
):
    """Prove that decoding with a drafter changes no text: trees, batch sizes, sampling, dtypes. Exit code 1 when one
    does in fp32.
    """
    from draftsmith.launch.proof import verify

    variables, place = template_variables(template_arg), Path(output)
    if not verify(
        methods,
        suite,
        target or [],
        dtype,
        tree,
        batch,
        temperature,
        max_new_tokens,
        limit,
        seed,
        place,
        say,
        datastore,
        variables,
    ):
        raise SystemExit(1)


@app.command()
def sweep(
    drafter: Drafter,
    suite: Annotated[str, typer.Option(help="JSONL, JSON, Parquet or bundled:PATH")] = "bundled:prompts/code.jsonl",
    target: Annotated[str, typer.Option(help="default: the one that the drafter names")] = None,
    tree: Annotated[list[str], typer.Option(help="trees to time; default: a map of depths, sizes and widths")] = None,
    temperature: Temperature = 0.0,
    batch: Annotated[int, typer.Option(min=1, help="prompts at a time")] = 1,
    max_new_tokens: NewTokens = 64,
    limit: Limit = 8,
    seed: Seed = 0,
    output: Output = "runs/sweep",
    threads: Threads = None,
    datastore: Datastore = None,
    template_arg: TemplateArgs = [],
):
    """Time many trees of a drafter beside the one that `--tree auto` chooses. Writes OUTPUT/sweep.json."""
    from draftsmith.launch.sweep import sweep

    sweep(
        drafter,
        suite,
        target,
        tree,
        temperature,
        batch,
        max_new_tokens,
        limit,
        seed,
        Path(output),
        say,
        threads,
        datastore,
        template_variables(template_arg),
    )


@app.command(name="tune-tree")
def tune_tree(
    method: Annotated[str, typer.Argument(help="stand[:MODE], recycling, or a drafter whose tree is static")],
    suite: Annotated[str, typer.Option(help="prompts to tune on: JSONL, JSON, Parquet or bundled:PATH")],
    output: Annotated[Path, typer.Option(help="FILE.json")] = Path("tree.json"),
    target: Annotated[str, typer.Option(help="default: the one that the drafter names")] = None,
    size: Annotated[int, typer.Option(min=1, help="drafted nodes of the tree, at most")] = 80,
    candidates: Annotated[int, typer.Option(min=1, help="nodes of the large tree that it is chosen from")] = 625,
    depth: Annotated[int, typer.Option(min=1, help="levels of the large tree")] = 20,
    trajectories: Annotated[int, typer.Option(min=1, help="samples of each prompt, memory kept between them")] = 4,
    temperature: Temperature = 1.0,
    max_new_tokens: NewTokens = 128,
    limit: Limit = 30,
    seed: Seed = 0,
    template_arg: TemplateArgs = [],
):
    """Find the static tree that suits a method on some prompts. Writes OUTPUT, which --tree takes."""
    from draftsmith.launch.tune import tune_tree

    tune_tree(
        method,
        suite,
        target,
        output,
        size,
        candidates,
        depth,
        trajectories,
        temperature,
        max_new_tokens,
        limit,
        seed,
        say,
        template_variables(template_arg),
    )


@app.command(name="plan-cascade")
def plan_cascade(
    target: Annotated[str, typer.Argument(help="Hub id, directory or bundled:NAME")],
    candidates: Annotated[
        list[str],
        typer.Argument(help="middle models, the slowest first: skip:K, int8, or models of the same tokenizer"),
    ],
    drafter: Annotated[str, typer.Option(help="METHOD that drafts at the end of the chain")] = "suffix",
    suite: Annotated[str, typer.Option(help="JSONL, JSON, Parquet or bundled:PATH")] = "bundled:prompts/code.jsonl",
    temperature: Temperature = 0.0,
    max_new_tokens: NewTokens = 64,
    limit: Limit = 8,
    seed: Seed = 0,
    output: Output = "runs/cascade",
    template_arg: TemplateArgs = [],
):
    """Measure whether middle models pay between a target and a drafter, by criterion and by the clock; recommend a
    chain. Writes OUTPUT/cascade.json.
    """
    from draftsmith.launch.cascades import Asked
    from draftsmith.launch.cascades import plan_cascade as plan

    variables = template_variables(template_arg)
    plan(
        Asked(
            target,
            tuple(candidates),
            drafter,
            suite,
            Path(output),
            temperature,
            max_new_tokens,
            limit,
            seed,
            variables,
        ),
        say,
    )


@app.command()
def report(output: Annotated[str, typer.Argument(help="the --output of a finished eval")] = "runs/eval"):
    """Make the report (Markdown and pictures) of a finished measurement anew."""
    from draftsmith.launch.report import report

    report(Path(output), say)
