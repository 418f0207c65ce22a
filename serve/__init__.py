"""The place of the serving engine (scheduling, pages, transfer, HTTP); it holds nothing yet."""
