"""The layers of a DeepSeek model; each file is one noun of the report."""
