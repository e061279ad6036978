"""Import what commands import themselves, so that a server pays for it once."""

import duckdb
import jinja2
import matplotlib.figure
import pandas
import polars
import pyarrow.dataset
import scipy.optimize
import scipy.stats
import seaborn

import entrace.analysis.claims
import entrace.analysis.compare
import entrace.analysis.importers.run
import entrace.analysis.report
import entrace.analysis.runs
import entrace.trainer.external.teacher_forcing

__all__ = ["duckdb", "entrace", "jinja2", "matplotlib", "pandas", "polars", "pyarrow", "scipy", "seaborn"]
