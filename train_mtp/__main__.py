"""`python -m train_mtp`: the same commands as `dskjax train-mtp`."""

from dskjax.cli import main, train_mtp

main(train_mtp)
