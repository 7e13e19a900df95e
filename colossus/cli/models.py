"""`colossus models`."""

from __future__ import annotations

WIDTH = 100  # of the table, also where the output is no terminal
SEQ_LEN = 4096  # for which FLOPs are shown


def models() -> None:
    """List the models that `model=NAME` knows."""
    from rich.console import Console
    from rich.table import Table

    from colossus.architecture import num_active, num_parameters
    from colossus.job import load_job, preset_facts, preset_names
    from colossus.perf.flops import model_flops_per_token
    from colossus.words import count

    table = Table(box=None, pad_edge=False)
    table.add_column("model=", no_wrap=True)
    sizes = ("total", "active", "published", "layers", "width", "heads", "experts", "context", "GFLOPs")
    for column in sizes:
        table.add_column(column, justify="right", no_wrap=True)
    rows = []
    for name in preset_names("model"):
        arch = load_job(None, [f"model={name}"]).model
        rows.append((name.partition("-")[0], num_parameters(arch), name, arch))
    for _, parameters, name, arch in sorted(rows, key=lambda row: row[:3]):
        facts, experts = preset_facts("model", name), arch.experts
        published = [facts[key] for key in ("published", "published_active") if key in facts]
        flops = model_flops_per_token(arch, min(SEQ_LEN, arch.max_seq_len))
        table.add_row(
            name,
            count(parameters),
            count(num_active(arch)) if experts is not None else "",
            "/".join(published) or "-",
            f"{arch.num_layers}",
            f"{arch.hidden_size:,}",
            f"{arch.num_heads}/{arch.num_kv_heads}",
            f"{experts.per_token}/{experts.num_experts}" if experts is not None else "",
            f"{arch.max_seq_len:,}",
            f"{flops / 1e9:,.3g}" if flops < 1e12 else f"{flops / 1e9:,.0f}",
        )
    console = Console(width=WIDTH)
    with console.capture() as drawn:  # of itself, rich ends with 1 where the reader leaves early
        console.print(table)
    print(drawn.get())
    print(
        "total, active: parameters, and those that one token visits; published: what its makers say of both."
    )
    print("heads: of queries / of keys and values; experts: visited by a token / of a layer, without shared.")
    print("GFLOPs: of training, a token, in samples of 4,096 tokens or the context, where that is shorter.")
    print("Each is a preset: colossus train model=llama3.2-1b run.minutes=5")
