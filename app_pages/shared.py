"""What pages share: the one place to import from.

    from app_pages import shared

    choice = shared.trace_picker("trace")                     # the same key on two pages: the same choice on both
    with shared.error_in_place():
        run = shared.read(shared.quick_run(choice, scenario))  # a sample, at once
    shared.chart(ecdf_chart(frame), alt="…", key="page_ecdf")

Keys name URL parameters and must be unique over all pages, unless two pages mean the same thing by them.
"""

from app_pages.shared_files import ask_for_files
from app_pages.shared_link import end_page
from app_pages.shared_output import (
    chart,
    command_line,
    downloads,
    drawn_with_downloads,
    error_in_place,
    figures,
    footer,
    kpi_row,
    kpi_table,
    page_header,
    say,
    show_error,
    table,
    warn_of_rejections,
)
from app_pages.shared_runs import (
    REQUESTS,
    answers,
    cached_frame,
    full_run,
    full_runs,
    given_runs,
    long_job,
    quick_run,
    read,
    runs_picker,
    store,
)
from app_pages.shared_scenario import check_size, other_fields, scenario_picker, within
from app_pages.shared_trace import trace_picker
from app_pages.shared_words import plain
from llmsim.choice import TraceChoice

__all__ = [
    "REQUESTS",
    "TraceChoice",
    "answers",
    "ask_for_files",
    "cached_frame",
    "chart",
    "check_size",
    "command_line",
    "downloads",
    "drawn_with_downloads",
    "end_page",
    "error_in_place",
    "figures",
    "footer",
    "full_run",
    "full_runs",
    "given_runs",
    "kpi_row",
    "kpi_table",
    "long_job",
    "other_fields",
    "page_header",
    "plain",
    "quick_run",
    "read",
    "runs_picker",
    "say",
    "scenario_picker",
    "show_error",
    "store",
    "table",
    "trace_picker",
    "warn_of_rejections",
    "within",
]
