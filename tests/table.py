"""The table in docs/formats.md, from the tests of test_formats.py that ran."""

import re
from pathlib import Path

TABLE = Path(__file__).parent.parent / "docs" / "formats.md"
COLUMNS = {
    "load": "loads, bit for bit",
    "logits": "logits equal the judge's",
    "generate": "generates as the judge",
    "save": "saved as",
    "round_trip": "round trip, bit for bit, over",
}
# What a format has no words for, and what the error says.
CANNOT = {
    ("official mamba3 siso", "hf"): "transformers has no model for 'mamba3'",
    ("official mamba3 mimo", "hf"): "transformers has no model for 'mamba3'",
    (
        "official mamba2attn",
        "hf",
    ): "transformers' bamba cannot express blocks without an MLP, or with experts",
    ("hf jamba", "official"): "the official format cannot express experts",
    ("hf falcon_mamba", "official"): "the official format cannot express inner_norm='plain'",
}


def rows_of(text: str, strip: bool = False) -> list[str]:
    """The first cells of the table's rows."""
    body = text.split("<!-- table -->")[1].split("<!-- end -->")[0]
    lines = [line for line in body.splitlines() if line.startswith("| ")][1:]
    return [line.split("|")[1].strip() for line in lines]


def make(outcomes: dict[tuple[str, str], str]) -> str:
    """The table of {(test, case): "passed" or "failed"}."""
    families = list(dict.fromkeys(case for test, case in outcomes if test == "load"))
    lines = ["| format | " + " | ".join(COLUMNS.values()) + " |", "|---" * 6 + "|"]
    for family in families:
        cells = []
        for test in COLUMNS:
            found = {
                case.removeprefix(family).strip("-"): outcome
                for (name, case), outcome in outcomes.items()
                if name == test and re.fullmatch(rf"(\w+-)?{re.escape(family)}(-\w+)?", case)
            }
            found |= {
                case[: -len(family)].strip("-"): outcome
                for (name, case), outcome in outcomes.items()
                if name == test and case.endswith(f"-{family}")
            }
            bad = [case for case, outcome in found.items() if outcome != "passed"]
            if bad or not found:
                cells.append("failed" if bad else "not run")
            elif test in ("save", "round_trip"):
                cells.append(", ".join(sorted(found, key=["mambapy", "official", "hf"].index)))
            elif test == "logits":
                cells.append("float32 1e-5, float64 1e-10")
            else:
                cells.append("yes")
        lines.append(f"| {family} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write(outcomes: dict[tuple[str, str], str]) -> None:
    """Put the table into docs/formats.md."""
    text = TABLE.read_text(encoding="utf-8")
    head, rest = text.split("<!-- table -->")
    tail = rest.split("<!-- end -->")[1]
    filled = f"{head}<!-- table -->\n{make(outcomes)}\n<!-- end -->{tail}"
    TABLE.write_text(filled, encoding="utf-8")
