import sys, time
from tests.ranks.cases import *
from tests.ranks.pool import Pool
from colossus.layout import violations
if __name__ == "__main__":
    pool = Pool()
    import ast
    for spec in sys.argv[1:]:
        kw = eval(f"dict({spec})")
        names = {f for f in Case.__dataclass_fields__}
        lay = {k: v for k, v in kw.items() if k not in names}
        rest = {k: (tuple(v.items()) if k=="changed" else v) for k, v in kw.items() if k in names}
        case = Case(layout=tuple(lay.items()), **rest)
        job = case.job()
        bad = violations(job.layout, case.arch, global_batch=case.batch, seq_len=case.seq_len)
        if bad: print(spec, "ILLEGAL", bad); continue
        t = time.time()
        try:
            r = pool.run(job.layout.num_ranks, train, case)
            print(spec, {k: f"{v:.1e}" for k, v in deviations(case, r).items()}, f"{time.time()-t:.1f} s", flush=True)
        except AssertionError as e:
            print(spec, "FAILED", str(e)[-1800:], flush=True)
