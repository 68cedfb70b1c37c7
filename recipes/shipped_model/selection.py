"""The rules that choose and clean the documents of the shipped model. RULE states them for the data card."""

from __future__ import annotations

import ast
import re
import warnings
from itertools import pairwise
from typing import Any

PIECE = 5600  # characters, about 1,700 tokens: a document fits into the context of 2,048 tokens
CODE_BYTES = (500, 30_000)
LINE = 110
LITERAL_ELEMENTS = 40
STRING_CHARACTERS = 3000

RULE = (
    "code: the first 27.5 M tokens, in the order of the files, of ASCII Python files of 500 to 30,000 bytes that "
    "parse, leading licence comments removed, without the top-level statements that are not indented by four "
    "spaces or hold a line over 110 characters, a literal of more than 40 elements or a string of more than 3,000 "
    "characters, cut between top-level statements into documents of at most 5,600 characters (a longer class "
    "between its methods, its head repeated; other longer statements left out); "
    "prose: the first 20.5 M tokens of children's fiction, then of adventure stories, each group in a seeded "
    "order of books, typographic quotes and dashes in ASCII, each paragraph on one line, headings, notes and "
    "tables left out, cut between paragraphs into documents of at most 5,600 characters; "
    "kids, dialog and math: everything; "
    "exact duplicates and documents of 2,000 tokens or more left out; all documents in one seeded order"
)

# Simple language first: a small model learns whole sentences from it.
CHILDREN = re.compile(
    r"baum|van dyne|akers|stanton|bancroft|metcalf|estes cooke|hugh fitzgerald|nesbit|burnett|\blang\b|grimm|andersen|"
    r"alcott|montgomery|barrie|carroll|potter|perrault|aesop|godolphin|harrison|allison|gorham|davenport|elwes",
    re.IGNORECASE,
)
ADVENTURE = re.compile(
    r"alger|lawton|goldfrap|payson|forrester|deering|marvin west|twain|henty|kingston", re.IGNORECASE
)
TALES = re.compile(r"fairy|children|little|nursery|juvenile|tales", re.IGNORECASE)

ASCII_QUOTES = str.maketrans(
    {"“": '"', "”": '"', "„": '"', "‘": "'", "’": "'", "—": "--", "–": "-", "…": "...", "\u00a0": " ", "\t": " "}
)
ITALICS = re.compile(r"_(\S(?:[^_\n]*\S)?)_")
LICENCE = re.compile(r"licen[sc]e|copyright", re.IGNORECASE)


def book_rank(row: dict[str, Any]) -> int:
    """0 for children's fiction, 1 for adventure stories, 2 for everything else."""
    author, title = str(row.get("author", "")), str(row.get("title", ""))
    if CHILDREN.search(author) or (author == "Various" and TALES.search(title)):
        return 0
    return 1 if ADVENTURE.search(author) else 2


def prose_documents(text: str) -> list[str]:
    """Cut a book into documents of whole paragraphs, each paragraph on one line."""
    text = ITALICS.sub(r"\1", text.translate(ASCII_QUOTES)).replace("\r\n", "\n")
    paragraphs = [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text)]
    return gather([paragraph for paragraph in paragraphs if is_prose(paragraph)], "\n\n")


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph is running text: no heading, table, note or illustration."""
    if not paragraph or any(mark in paragraph for mark in ("[", "_", "*", "|", "http", "Gutenberg")):
        return False
    letters = sum(character.isalpha() or character == " " for character in paragraph)
    small = sum(character.islower() for character in paragraph)
    starts_well = paragraph[0].isupper() or paragraph[0] in "\"'("
    ends_well = paragraph[-1] in ".!?\"':;,-)"
    return letters > 0.85 * len(paragraph) and small > 0.55 * len(paragraph) and starts_well and ends_well


def kids_documents(text: str) -> list[str]:
    """A children's book: its title and paragraphs, kept whole as far as the context allows."""
    paragraphs = [" ".join(paragraph.split()) for paragraph in re.split(r"\n+", text.translate(ASCII_QUOTES))]
    return gather([paragraph for paragraph in paragraphs if paragraph], "\n\n")


def code_documents(text: str) -> list[str]:
    """Cut a Python file between top-level statements; nothing when a rule leaves the file out."""
    if not CODE_BYTES[0] <= len(text) <= CODE_BYTES[1] or not text.isascii() or re.search(r"[\t\r\f]", text):
        return []
    text = without_licence("\n".join(line.rstrip() for line in text.split("\n"))).strip("\n")
    tree = parsed(text)
    if tree is None or not tree.body:
        return []
    lines = text.split("\n")
    starts = [0, *(first_line(lines, node, before) for before, node in pairwise(tree.body))]
    ends = [*starts[1:], len(lines)]
    blocks = [
        "\n".join(lines[start:end])
        for node, start, end in zip(tree.body, starts, ends, strict=True)
        if is_tidy(node) and max(map(len, lines[start:end]), default=0) <= LINE
    ]
    blocks = [block for long in blocks for block in (class_documents(long) if len(long) > PIECE else [long])]
    # A statement that still does not fit is left out: half a function is no Python.
    blocks = [block for block in blocks if len(block) <= PIECE]
    documents = [document.strip("\n") + "\n" for document in gather(blocks, "\n")]
    return [document for document in documents if len(document) >= 200 and parsed(document) is not None]


def class_documents(text: str) -> list[str]:
    """Cut a long class between its methods; every part repeats the head of the class. Other text stays whole."""
    tree = parsed(text)
    node = tree.body[0] if tree and len(tree.body) == 1 else None
    if not isinstance(node, ast.ClassDef):
        return [text]
    lines = text.split("\n")
    methods = [i for i, item in enumerate(node.body) if i and isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)]
    starts = [first_line(lines, node.body[i], node.body[i - 1]) for i in methods]
    head = "\n".join(lines[: top_line(node.body[0])])
    if not starts:
        return [text]
    first = "\n".join(lines[: starts[0]])
    blocks = ["\n".join(lines[a:b]) for a, b in zip(starts, [*starts[1:], len(lines)], strict=True)]
    blocks = [block for block in blocks if len(head) + 1 + len(block) <= PIECE]
    return [first, *(f"{head}\n{part.strip(chr(10))}\n\n" for part in gather(blocks, "\n", PIECE - len(head) - 3))]


def parsed(text: str) -> ast.Module | None:
    """The syntax tree, or None where the text is no Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def without_licence(text: str) -> str:
    """Remove the leading comment block where it is a licence notice."""
    lines = text.split("\n")
    end = next((i for i, line in enumerate(lines) if line and not line.startswith("#")), len(lines))
    return "\n".join(lines[end:]) if LICENCE.search("\n".join(lines[:end])) else text


def is_tidy(tree: ast.stmt) -> bool:
    """Whether blocks are indented by four spaces and no literal is a data table."""
    for node in ast.walk(tree):
        if isinstance(node, ast.List | ast.Tuple | ast.Set) and len(node.elts) > LITERAL_ELEMENTS:
            return False
        if isinstance(node, ast.Dict) and len(node.keys) > LITERAL_ELEMENTS:
            return False
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str | bytes)
            and len(node.value) > STRING_CHARACTERS
        ):
            return False
        body = getattr(node, "body", None)
        is_block = isinstance(node, ast.stmt) and isinstance(body, list) and body[0].lineno != node.lineno
        if is_block and body[0].col_offset != node.col_offset + 4:
            return False
    return True


def first_line(lines: list[str], node: ast.stmt, before: ast.stmt) -> int:
    """Index of a statement's first line, its decorators and the comments right above it included."""
    line = top_line(node)
    while line > (before.end_lineno or 0) and lines[line - 1].lstrip().startswith("#"):
        line -= 1
    return line


def top_line(node: ast.stmt) -> int:
    """Index of a statement's first line, its decorators included."""
    return min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))]) - 1


def gather(blocks: list[str], gap: str, limit: int = PIECE) -> list[str]:
    """Join consecutive blocks into documents of at most `limit` characters (a longer block stays alone)."""
    documents: list[str] = []
    for block in blocks:
        if documents and len(documents[-1]) + len(gap) + len(block) <= limit:
            documents[-1] += gap + block
        else:
            documents.append(block)
    return [document for document in documents if document.strip()]
