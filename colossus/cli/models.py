"""`colossus models`."""

from __future__ import annotations


def models() -> None:
    """List the models that `model=NAME` knows."""
    from rich.console import Console
    from rich.table import Table

    from colossus.architecture import num_parameters
    from colossus.job import load_job, preset_names
    from colossus.words import count

    table = Table(box=None, pad_edge=False)
    table.add_column("model=", no_wrap=True)
    for column in ("parameters", "layers", "width", "heads", "mlp", "vocabulary", "context"):
        table.add_column(column, justify="right", no_wrap=True)
    rows = []
    for name in preset_names("model"):
        arch = load_job(None, [f"model={name}"]).model
        rows.append((num_parameters(arch), name, arch))
    for parameters, name, arch in sorted(rows, key=lambda row: (row[0], row[1])):
        sizes = (arch.intermediate_size, arch.vocab_size, arch.max_seq_len)
        heads = f"{arch.num_heads}/{arch.num_kv_heads}"
        shape = (f"{arch.num_layers}", f"{arch.hidden_size:,}", heads, *(f"{size:,}" for size in sizes))
        table.add_row(name, count(parameters), *shape)
    console = Console()
    with console.capture() as drawn:  # of itself, rich ends with 1 where the reader leaves early
        console.print(table)
    print(drawn.get())
    print("heads: of queries / of keys and values; mlp: its width.")
    print("Each is a preset: colossus train model=llama3.2-1b run.minutes=5")
