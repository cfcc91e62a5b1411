"""The layers of a model: a page about one picture, and a study over many questions.

>>> analysis = analyze_picture(subject, picture, question, default_rules())  # doctest: +SKIP
>>> save_page(Path("report.html"), build_picture_page(analysis))  # doctest: +SKIP
"""

from corematching.lab.analyze.page import save_page
from corematching.lab.analyze.picture import PictureAnalysis, analyze_picture
from corematching.lab.analyze.picture_page import build_picture_page
from corematching.lab.analyze.rank import correlate_ranks, measure_recovery, rank_values
from corematching.lab.analyze.rules import Rule, default_rules
from corematching.lab.analyze.study import StudyPlan, study_task
from corematching.lab.analyze.study_page import build_study_page, write_tables
from corematching.lab.analyze.watch import watch_layers

__all__ = [
    "PictureAnalysis",
    "Rule",
    "StudyPlan",
    "analyze_picture",
    "build_picture_page",
    "build_study_page",
    "correlate_ranks",
    "default_rules",
    "measure_recovery",
    "rank_values",
    "save_page",
    "study_task",
    "watch_layers",
    "write_tables",
]
