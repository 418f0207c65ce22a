"""Commands of the server: serve, chat."""

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from dskjax.cli.common import (
    DequantiseOption,
    Dtype,
    DtypeOption,
    ImplOption,
    ModelDir,
    RevisionOption,
    app,
    err,
    find,
)


@app.command()
def serve(
    model: ModelDir,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 picks a free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="Name of the model; default: its folder's.")
    ] = None,
    roles: Annotated[
        str, typer.Option(help="ifb, Nifb, or xPyD: prefill and decode engines, as in 1P1D.")
    ] = "ifb",
    prefill_tp: Annotated[int, typer.Option(help="Ways each prefill engine splits widths.")] = 1,
    decode_tp: Annotated[int, typer.Option(help="Ways each other engine splits widths.")] = 1,
    prefill_ep: Annotated[int, typer.Option(help="Ways each prefill engine splits experts.")] = 1,
    decode_ep: Annotated[int, typer.Option(help="Ways each other engine splits experts.")] = 1,
    mesh: Annotated[
        str,
        typer.Option(
            help="Like dp=2,ep=4: the ranks of each ifb engine have requests of their own."
        ),
    ] = "",
    prefill_mesh: Annotated[
        str, typer.Option(help="The same for prefill engines; they send caches whole.")
    ] = "",
    decode_mesh: Annotated[str, typer.Option(help="The same for decode engines.")] = "",
    router: Annotated[
        str, typer.Option(help="remaining-slots, round-robin, request-count or kv-size.")
    ] = "remaining-slots",
    speculate: Annotated[
        int | None, typer.Option(help="Drafts a step; default: as many as the model has modules.")
    ] = None,
    accept: Annotated[
        str, typer.Option(help="Acceptance rule of requests that name none.")
    ] = "rejection",
    rules: Annotated[
        str, typer.Option(help="Rules that requests may name, by commas; all when empty.")
    ] = "",
    adaptive: Annotated[
        bool, typer.Option(help="Draft only where it pays, by what is measured.")
    ] = False,
    synthetic: Annotated[
        float | None,
        typer.Option(help="Simulate this mean accepted length; the text then means nothing."),
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="Most tokens of prompt and answer; default: the model's.")
    ] = None,
    slots: Annotated[int, typer.Option(help="Most sequences an engine decodes together.")] = 16,
    pages: Annotated[
        int | None, typer.Option(help="Cache pages of each engine; default: what memory allows.")
    ] = None,
    page_size: Annotated[int, typer.Option(help="Tokens a cache page.")] = 64,
    chunk: Annotated[int, typer.Option(help="Most prompt tokens a step.")] = 512,
    kv_dtype: Annotated[str, typer.Option(help="auto or fp8.")] = "auto",
    memory_fraction: Annotated[
        float, typer.Option(help="Of the device's memory, for weights, cache and scratch.")
    ] = 0.9,
    few_buckets: Annotated[
        bool | None,
        typer.Option(help="One program of each kind: starts fast, pads more. Default: on a CPU."),
    ] = None,
    mixed: Annotated[
        bool | None,
        typer.Option(help="Prompts and decoding share programs. Default: on a GPU."),
    ] = None,
    extras: Annotated[
        bool,
        typer.Option(help="Let requests choose rules, penalties, biases, logprobs, min_tokens."),
    ] = True,
    prompt_logprobs: Annotated[
        bool,
        typer.Option(help="Score prompts too (echo with logprobs): compiles more programs."),
    ] = False,
    unroll: Annotated[
        bool | None,
        typer.Option(help="Compile every layer on its own: faster steps. Default: on a GPU."),
    ] = None,
    redundant_experts: Annotated[
        int,
        typer.Option(help="Slots of each layer for copies of busy experts; needs a mesh."),
    ] = 0,
    rebalance_every: Annotated[
        int, typer.Option(help="Steps after which copies are dealt out anew; 0 never.")
    ] = 1000,
    prefill_policy: Annotated[
        Literal["short-first", "fcfs"], typer.Option(help="Which prompts go first.")
    ] = "short-first",
    layerwise_from: Annotated[
        int,
        typer.Option(help="Prompt tokens from which pages go layer group by layer group."),
    ] = 8192,
    layer_group: Annotated[int, typer.Option(help="Layers of such a group.")] = 8,
    max_waiting: Annotated[int, typer.Option(help="Requests that may wait.")] = 1024,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="Clients must send one of these; also DSKJAX_API_KEY. Repeat for more."),
    ] = None,
    public_metrics: Annotated[bool, typer.Option(help="/metrics needs no key.")] = False,
    drain_timeout: Annotated[
        float, typer.Option(help="Seconds for answers under way after SIGTERM.")
    ] = 30.0,
    cache_dir: Annotated[
        Path | None,
        typer.Option(help="Compiled programs are kept here; default ~/.cache/dskjax/xla."),
    ] = None,
    inject_faults: Annotated[
        str, typer.Option(help="Break transfers on purpose, to test; see the README.")
    ] = "",
    dtype: DtypeOption = None,
    dequantise: DequantiseOption = False,
    revision: RevisionOption = None,
    impl: ImplOption = "auto",
) -> None:
    """Serve a model over HTTP with an OpenAI API; prefill and decode together or apart."""
    import jax

    from dskjax.decode import RuleOptions
    from dskjax.decode.rules import RULE_NAMES
    from dskjax.mesh import parse_mesh
    from serve.config import parse_roles
    from serve.http.config import HttpConfig
    from serve.start import ServerOptions, engine_config, serve_model

    parsed = parse_roles(
        roles,
        prefill_tp=prefill_tp,
        decode_tp=decode_tp,
        prefill_ep=prefill_ep,
        decode_ep=decode_ep,
        mesh=parse_mesh(mesh),
        prefill_mesh=parse_mesh(prefill_mesh),
        decode_mesh=parse_mesh(decode_mesh),
    )
    needed = sum(role.devices for role in parsed)
    if needed > 1 and jax.config.jax_num_cpu_devices < needed:
        jax.config.update("jax_num_cpu_devices", needed)  # simulated, where there is no GPU
    keep = cache_dir or Path.home() / ".cache" / "dskjax" / "xla"
    jax.config.update("jax_compilation_cache_dir", str(keep))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    on_cpu = jax.default_backend() == "cpu"
    if (dtype or (Dtype.float32 if on_cpu else Dtype.bfloat16)) is Dtype.float32:
        jax.config.update("jax_default_matmul_precision", "highest")
    rule = RuleOptions.parse(accept)
    folder = find(model, revision)
    names = tuple(dict.fromkeys([*filter(None, rules.split(",")), rule.name]))
    engine = engine_config(
        folder,
        max_model_len=max_model_len,
        drafts=speculate,
        slots=slots,
        pages=pages,
        page_size=page_size,
        chunk=chunk,
        accept=rule,
        rules=names if rules else RULE_NAMES,
        adaptive=adaptive,
        synthetic=synthetic,
        kv_dtype=kv_dtype,
        impl=impl,
        few_buckets=on_cpu if few_buckets is None else few_buckets,
        mixed=not on_cpu if mixed is None else mixed,
        extras=extras,
        prompt_logprobs=prompt_logprobs,
        unroll=not (on_cpu or redundant_experts) if unroll is None else unroll,
        redundant_experts=redundant_experts,
        rebalance_every=rebalance_every,
        memory_fraction=memory_fraction,
        max_waiting=max_waiting,
        prefill_policy=prefill_policy,
        layerwise_from=layerwise_from,
        layer_group=layer_group,
    )
    keys = [*(api_key or []), *filter(None, [os.environ.get("DSKJAX_API_KEY")])]
    options = ServerOptions(
        model=folder,
        name=name or model.resolve().name,
        roles=parsed,
        engine=engine,
        router=router,
        faults=inject_faults,
        dtype=None if dtype is None else dtype.value,
        quantised="dequantise" if dequantise else "keep",
        http=HttpConfig(api_keys=tuple(keys), public_metrics=public_metrics),
    )
    status = serve_model(options, host, port, drain_timeout, err)
    raise typer.Exit(status)


@app.command()
def chat(
    url: Annotated[str, typer.Option(help="Where `dskjax serve` answers.")] = (
        "http://127.0.0.1:8000"
    ),
    model: Annotated[str | None, typer.Option(help="Model; default: the server's.")] = None,
    api_key: Annotated[str | None, typer.Option(help="Also DSKJAX_API_KEY.")] = None,
) -> None:
    """Talk to a running server in the terminal."""
    from serve.chat import run_chat

    run_chat(url, model=model, api_key=api_key or os.environ.get("DSKJAX_API_KEY"))
