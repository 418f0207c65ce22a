"""Serving: scheduling, pages, transfer between engines, and an OpenAI API over HTTP."""
