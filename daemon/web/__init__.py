"""The HTTP listener: parse, call, respond. No rules and no SQL live here."""
