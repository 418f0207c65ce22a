"""Decoding: sampling, acceptance rules, MTP drafting and the one jitted step."""
