"""The command line. Every command is one function call; errors meant for the user are one line and exit code 2."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from safetensors import SafetensorError

import draftsmith
import draftsmith.launch.measuring  # noqa: F401 (registers its commands)
from draftsmith.launch.program import (
    Count,
    Drafter,
    Dtype,
    HeldOut,
    Limit,
    Recipe,
    Seed,
    Target,
    Temperatures,
    TemplateArgs,
    app,
    datastore,
    say,
    template_variables,
)
from draftsmith.models.errors import UserError, keeping
from draftsmith.models.files import alone


def show_version(asked: bool) -> None:
    if asked:
        say(f"draftsmith {draftsmith.__version__}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=show_version, help="show the version and end")
    ] = False,
):
    pass


@app.command(context_settings={"ignore_unknown_options": True})
def train(recipe: Recipe, overrides: Annotated[list[str], typer.Argument(help="section.key=value")] = None):
    """Train a drafter by a recipe (one process; `draftsmith launch RECIPE` for several)."""
    from draftsmith.launch.training import main

    raise SystemExit(main([recipe, *(overrides or [])]))


@app.command()
def launch(
    recipe: Recipe,
    overrides: Annotated[list[str], typer.Argument(help="section.key=value")] = None,
    gpus: Annotated[
        int, typer.Option(min=1, help="processes on this machine, one a GPU; with --slurm: on each machine, default 1")
    ] = None,
    hosts: Annotated[Path, typer.Option(help="machines, as DeepSpeed writes them: NAME slots=N a line")] = None,
    node_rank: Annotated[
        int, typer.Option(help="start only the part of this machine, number K of the hostfile: no ssh needed")
    ] = None,
    master_addr: Annotated[
        str, typer.Option(help="where the processes meet; default: the first machine of the hostfile")
    ] = None,
    master_port: Annotated[int, typer.Option(min=1, max=65535, help="where the processes meet; default: 29500")] = None,
    slurm: Annotated[
        bool, typer.Option(help="write a batch script that saves, queues itself again and resumes, and submit it")
    ] = False,
    nodes: Annotated[int, typer.Option(min=1, help="machines of the Slurm job; default: 1")] = None,
    time: Annotated[
        str, typer.Option(help="limit of the Slurm job, after which it is queued again; default: 24:00:00")
    ] = None,
    partition: Annotated[str, typer.Option(help="of the Slurm job")] = None,
    dry_run: Annotated[bool, typer.Option(help="show what would be run and written")] = False,
):
    """Train by a recipe in several processes: on this machine, on those of a hostfile, or by Slurm. The same command
    resumes a lost run.
    """
    from draftsmith.launch import nodes as machines
    from draftsmith.launch.slurm import in_a_queue

    overrides = overrides or []
    _belong(
        {"--node-rank": node_rank, "--master-addr": master_addr, "--master-port": master_port},
        hosts is not None,
        "--hosts",
    )
    _belong({"--nodes": nodes, "--time": time, "--partition": partition}, slurm, "--slurm")
    if slurm and hosts is None:
        raise SystemExit(
            in_a_queue(recipe, overrides, nodes or 1, gpus or 1, time or "24:00:00", partition, dry_run, say)
        )
    if hosts is not None and not slurm and gpus is None:
        raise SystemExit(machines.on_hosts(recipe, overrides, hosts, node_rank, master_addr, master_port, dry_run, say))
    if gpus and not slurm and hosts is None:
        raise SystemExit(machines.on_this_machine(recipe, overrides, gpus, dry_run, say))
    found = [name for name, given in {"--gpus": gpus, "--hosts": hosts, "--slurm": slurm}.items() if given]
    raise UserError(f"launch: found {' '.join(found) or 'no place to run'}, expected --gpus N, --hosts FILE or --slurm")


def _belong(options: dict, there: bool, owner: str, command: str = "launch") -> None:
    given = [name for name, value in options.items() if value is not None]
    if given and not there:
        raise UserError(f"{command}: found {given[0]} without {owner}, expected both or neither")


@app.command()
def inspect(
    recipe: Recipe,
    overrides: Annotated[list[str], typer.Argument(help="section.key=value")] = None,
    samples: Annotated[int, typer.Option(min=1, help="rows that are shown")] = 3,
):
    """Show a recipe's training rows, the tokens that the target wrote in green."""
    from rich.console import Console

    from draftsmith.launch.inspect import inspect
    from draftsmith.train.recipe import DrafterRecipe, read_recipe

    inspect(read_recipe(recipe, DrafterRecipe, overrides or []), samples, Console())


@app.command()
def pretrain(recipe: Recipe, overrides: Annotated[list[str], typer.Argument(help="section.key=value")] = None):
    """Train a bundled reference target by its recipe: text alone, or one that sees (a recipe with a section
    `vision`).
    """
    from draftsmith.train.recipe import has_section, read_recipe
    from draftsmith.train.reference.pretrain import TargetRecipe
    from draftsmith.train.reference.pretrain import pretrain as work

    kind, seeing = TargetRecipe, has_section(recipe, "vision")
    if seeing:
        from draftsmith.train.reference.pretrain_vision import VisionRecipe as kind
        from draftsmith.train.reference.pretrain_vision import pretrain_vision as work

    asked = read_recipe(recipe, kind, overrides or [])
    place, snapshot = Path(asked.output), Path(f"{asked.output}.partial/checkpoint")
    kept = lambda: (  # noqa: E731
        f"{snapshot} is complete: the same command resumes there"
        if seeing and snapshot.is_dir()
        else "there is nothing to go on from: the same command begins anew"
    )
    with alone(place.parent, place.name, asked.output), keeping(kept):
        work(asked, say)


@app.command()
def prompts(
    output: Annotated[str, typer.Argument(help="a new file, JSONL")],
    count: Count = 1000,
    package: Annotated[list[str], typer.Option(help="installed package, or python: the standard library")] = ["python"],
    seed: Seed = 0,
    held_out: HeldOut = False,
    tests: Annotated[bool, typer.Option(help="test functions instead of documented ones")] = False,
    target: Target = "bundled:targets/code",
):
    """Cut questions (signature and docstring) out of Python source on this machine."""
    from draftsmith.launch.prompts import write_prompts
    from draftsmith.models.chat import load_tokenizer

    say(f"prompts in {write_prompts(package, output, count, seed, load_tokenizer(target), held_out, tests)}")


@app.command()
def longbench(
    output: Annotated[str, typer.Argument(help="a new file, JSONL")],
    conversations: Annotated[list[str], typer.Option(help="files of `conversation` (WildChat) or `messages`")] = [],
    documents: Annotated[list[str], typer.Option(help="files of `text` and `question`")] = [],
    package: Annotated[list[str], typer.Option(help="installed packages, or python: repository-level questions")] = [],
    questions: Annotated[int, typer.Option(min=1, help="functions asked for in a module, one a prompt")] = 1,
    held_out: Annotated[bool, typer.Option(help="ask for functions of modules that no training saw")] = False,
    edge: Annotated[list[int], typer.Option(help="borders of the bins, tokens")] = [4096, 8192, 16384, 32768, 65536],
    cut: Annotated[
        list[int], typer.Option(help="instead of bins: every prompt cut from the left to each of these lengths")
    ] = [],
    count: Count = 200,
    sampler: Annotated[str, typer.Option(help="natural or balanced")] = "natural",
    fill: Annotated[bool, typer.Option(help="put unrelated prompts in front until a bin is reached")] = False,
    seed: Seed = 0,
    target: Target = "bundled:targets/code-long",
    template_arg: TemplateArgs = [],
):
    """Build a suite of long prompts (LongSpecBench) with bins of lengths."""
    from collections import Counter
    from itertools import chain

    from draftsmith.launch import longbench as bench
    from draftsmith.models.chat import load_tokenizer
    from draftsmith.models.rendering import Renderer

    reader, left_out = Renderer(load_tokenizer(target), template_variables(template_arg)), Counter()
    sources = [bench.conversations(file, left_out) for file in conversations] + [
        bench.documents(file, left_out) for file in documents
    ]
    if package:
        sources.append(bench.repositories(package, held_out, max(cut or edge), reader, seed, questions))
    if not sources:
        raise UserError("longbench: found no source, expected --conversations, --documents or --package")
    if cut:
        found = bench.rendered(chain(*sources), reader, max(cut), left_out)
        bench.write_suite(bench.cut(found, tuple(cut), count, reader, left_out), output, left_out, say)
    else:
        bench.longbench(sources, output, reader, tuple(edge), count, sampler, fill, seed, left_out, say)


@app.command()
def scenes(
    output: Annotated[str, typer.Argument(help="a new folder")],
    count: Count = 1000,
    seed: Seed = 0,
    held_out: HeldOut = False,
):
    """Draw scenes for `shapes-vlm`: pictures, and questions and descriptions as LLaVA-format JSON."""
    from draftsmith.launch.scenes import write_scenes

    say(f"conversations in {write_scenes(output, count, seed, held_out)}")


@app.command()
def regenerate(
    target: Annotated[str, typer.Argument(help="Hub id, directory or bundled:NAME")],
    prompts: Annotated[str, typer.Argument(help="JSONL, JSON (either gzipped) or Parquet")],
    output: Annotated[str, typer.Argument(help="file of the answers, JSONL; OUTPUT.partial until it is complete")],
    temperature: Temperatures = [0.0],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="of an answer, at most")] = 160,
    batch: Annotated[int, typer.Option(min=1, help="prompts at a time, in each process")] = 64,
    limit: Limit = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    processes: Annotated[int, typer.Option(min=1, help="that share the prompts and the cores, or the GPUs")] = 1,
    drafter: Annotated[str, typer.Option(help="drafts meanwhile: directory, Hub id or bundled:NAME")] = None,
    tree: Annotated[str, typer.Option(help="of the drafter: chain:DEPTH or dynamic:TOP_KxDEPTHxSIZE")] = None,
    server: Annotated[str, typer.Option(help="http://HOST:PORT with OpenAI's completions answers instead")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="requests at a time to the server; default: 64")] = None,
    template_arg: TemplateArgs = [],
):
    """Let the target answer prompts; a killed run goes on where it stopped."""
    from draftsmith.launch import regenerate as answers

    _belong({"--tree": tree}, drafter is not None, "--drafter", "regenerate")
    _belong({"--concurrency": concurrency}, server is not None, "--server", "regenerate")
    place = answers.regenerate(
        target,
        prompts,
        output,
        temperature,
        max_new_tokens,
        batch,
        limit,
        seed,
        say,
        dtype,
        processes,
        drafter,
        tree or answers.TREE,
        server,
        concurrency or answers.CONCURRENCY,
        template_variables(template_arg),
    )
    say(f"answers in {place}")


@app.command()
def demo(
    target: Annotated[
        str, typer.Option(help="code: in the repository; smollm2: a real chat model, fetched once")
    ] = "code",
    output: Annotated[str, typer.Option(help="default: runs/demo, with another target runs/demo-TARGET")] = None,
):
    """Train a drafter for the target on its own answers, measure it beside the shipped one, check losslessness."""
    from draftsmith.launch.demo import demo

    demo(target, output and Path(output), say)


@app.command()
def export(
    drafter: Drafter,
    output: Annotated[str, typer.Argument(help="a new folder")],
    to: Annotated[str, typer.Option(help="vllm, sglang, speculators or arctic")],
    target: Annotated[str, typer.Option(help="default: the one that the drafter names")] = None,
    depth: Annotated[int, typer.Option(min=1, help="drafted tokens in the config and in the command")] = 5,
):
    """Write a drafter (directory, Hub id or bundled:NAME) as a serving engine loads it, checked key by key."""
    from draftsmith.launch.export import export_drafter

    export_drafter(drafter, output, to, target, depth, say)


@app.command(name="import")
def import_(
    source: Annotated[str, typer.Argument(help="directory or Hub id")],
    output: Annotated[str, typer.Argument(help="a new folder")],
    target: Annotated[str, typer.Option(help="Hub id, directory or bundled:NAME that it drafts for")],
    pickle: Annotated[bool, typer.Option(help="also read pytorch_model.bin (tensors only)")] = False,
    taps: Annotated[
        str,
        typer.Option(help="what its tap numbers count, where it does not tell: entering (vLLM) or leaving (SGLang)"),
    ] = None,
):
    """Make a drafter of this project from a public one: EAGLE-3 or speculators, directory or Hub id."""
    from draftsmith.launch.export import import_drafter

    import_drafter(source, output, target, pickle, say, taps)


@app.command()
def push(
    drafter: Drafter,
    repository: Annotated[str, typer.Argument(help="USER/NAME")],
    private: Annotated[bool, typer.Option(help="make it a private repository")] = False,
    revision: Annotated[str, typer.Option(help="branch, made where it does not exist")] = None,
    dry_run: Annotated[bool, typer.Option(help="show files and card, send nothing")] = False,
    results: Annotated[
        Path, typer.Option(help="result.json of draftsmith eval; default: the one in the drafter's parent folder")
    ] = None,
    target: Annotated[str, typer.Option(help="Hub id; default: the one that the drafter names")] = None,
    license: Annotated[str, typer.Option(help="licence of the drafter, for instance apache-2.0")] = None,
):
    """Publish a drafter on the Hub with a card made from what was measured. The token is HF_TOKEN or that of `hf auth
    login`.
    """
    from draftsmith.launch.hub import push

    with keeping(lambda: "what was sent is kept: the same command goes on from there"):
        push(drafter, repository, private, revision, dry_run, results, target, license, say)


@app.command()
def fetch(target: Annotated[str, typer.Argument(help="GGUF file, hub:USER/NAME/FILE.gguf or bundled:NAME")]):
    """Fetch and dequantise a target where that is still to be done, and print its directory."""
    from draftsmith.models.targets import locate

    with keeping(lambda: "what was fetched whole is kept: the same command goes on"):
        say(locate(target))


@datastore.command()
def build(
    files: Annotated[
        list[str], typer.Argument(help="training data (JSONL, JSON, Parquet): rows with messages, tokens or text")
    ],
    target: Target,
    output: Annotated[str, typer.Option(help="a new directory")],
    shard_tokens: Annotated[
        int,
        typer.Option(min=1, help="tokens that are indexed together: building takes some 50 bytes of memory for each"),
    ] = 1 << 24,
    max_bad_rows: Annotated[
        float, typer.Option(min=0, max=1, help="share of a file's rows that may be unusable and are left out")
    ] = 0.0,
    template_arg: TemplateArgs = [],
):
    """Index what the target wrote in some files, for `--datastore OUTPUT` of methods that retrieve (reader)."""
    from draftsmith.launch.datastore import build

    build(files, target, Path(output), shard_tokens, say, template_variables(template_arg), max_bad_rows)


@app.command()
def doctor(recipes: Annotated[list[str], typer.Argument(help="default: the recipes that come with draftsmith")] = None):
    """Show this machine, what is installed, and what is missing for which recipe; exit code 1 when a package does not
    do.
    """
    from rich.console import Console

    from draftsmith.launch.doctor import doctor

    raise SystemExit(0 if doctor(recipes or [], Console()) else 1)


def main() -> None:
    try:
        app(standalone_mode=False)
    except (UserError, OSError, SafetensorError) as error:  # the last: what safetensors says of a full disk
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except typer.Abort:
        sys.exit(130)
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")):  # a wrong call of the command line itself
            print(f"error: {error.format_message() if hasattr(error, 'format_message') else error}", file=sys.stderr)
            sys.exit(2)
        raise


if __name__ == "__main__":
    main()
