"""What the commands of `dskjax.cli` do, as functions without a terminal's options."""
