class Done:
    """Losses of trials, kept in a file line by line as they end, so that a sweep may be stopped and go on."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.losses: dict[str, float] = {}
        if path is not None and path.is_file():
            for line in path.read_text().splitlines():
                self.losses |= json.loads(line)

    def add(self, name: str, loss: float) -> None:
        self.losses[name] = loss
        print(f"{name}: {loss:.4f}", flush=True)
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps({name: loss}) + "\n")


def trials_of(rule: str, widths: list[int], rates: list[float], like: Trial, seeds: int) -> list[Trial]:
    """One after another: all widths, rates and seeds of a rule, in other ways like `like`."""
    return [
        replace(like, width=w, base_width=w if rule == "standard" else like.base_width, rate=r, seed=s)
        for w in widths
        for r in rates
        for s in range(seeds)
    ]


def run_all(trials: list[Trial], done: Done) -> None:
    """Runs what is not done yet, one trial a core, the long ones first: the cores end together."""
    left = {trial for trial in trials if trial.name not in done.losses}
    with ProcessPoolExecutor(this_machine().cores, multiprocessing.get_context("spawn")) as pool:
        ordered = sorted(left, key=lambda trial: (-trial.width, trial.name))
        running = {pool.submit(Trial.loss, trial): trial for trial in ordered}
        for future in as_completed(running):
            done.add(running[future].name, future.result())


def figures_of(
    widths: list[int], rates: list[float], like: Trial, seeds: int, losses: dict[str, float]
) -> list[Figure]:
    """The best rate of each rule and width, how far it moves, and the mean losses that say so."""
    figures: list[Figure] = []
    for rule in RULES:
        best: list[int] = []
        rows: list[Figure] = []
        for width in widths:
            means = [
                mean(losses[trial.name] for trial in trials_of(rule, [width], [rate], like, seeds))
                for rate in rates
            ]
            best.append(means.index(min(means)))
            rows += [
                Figure(f"{rule}, width {width}, rate {rate:g}: held-out loss", loss, "nats a token")
                for rate, loss in zip(rates, means, strict=True)
            ]
            figures.append(Figure(f"{rule}, width {width}: best rate", rates[best[-1]], ""))
        moved = float(max(best) - min(best))
        goal = "at most 1" if rule == "scaled" else "above 1"
        figures += [Figure(f"{rule}: the best rate moves by", moved, "factors of 2", goal), *rows]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="two narrow widths, two rates, few steps")
    parser.add_argument("--out", help="the receipt")
    parser.add_argument("--optimizer", default="adamw", help="adamw, whose rate moves most, or muon")
    parser.add_argument("--done", type=Path, help="where losses are kept as they come, and read from")
    arguments = parser.parse_args()
    widths, rates = (list(WIDTHS), list(RATES)) if not arguments.quick else ([32, 64], list(RATES[:2]))
    seeds, steps = (SEEDS, STEPS) if not arguments.quick else (1, 10)
    like = Trial(widths[0], BASE_WIDTH, rates[0], 0, steps, arguments.optimizer)
    like.job()  # builds the shards, once
    done = Done(arguments.done)
    run_all([t for rule in RULES for t in trials_of(rule, widths, rates, like, seeds)], done)
    figures = figures_of(widths, rates, like, seeds, done.losses)
    print_figures(figures)
    write_receipt("transfer", figures, arguments.out, hardware=asdict(this_machine()))


if __name__ == "__main__":
    main()
