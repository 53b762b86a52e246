"""The what-if dashboard: `llmsim dashboard`, or `streamlit run app.py`.

Only pages are registered here. A page is a file in `app_pages/`; what pages share is in `app_pages/shared.py`; every
number is computed and every chart drawn by llmsim.
"""

from pathlib import Path

import streamlit as st

from app_pages.shared_link import checked_link
from llmsim import __version__

PAGES = {  # file: title, icon, what it shows
    "what_if": ("What if", ":material/compare_arrows:", "Two set-ups on the same requests, side by side."),
    "phases": ("Prefill vs decode", ":material/stacked_line_chart:", "Why the two phases differ, on a roofline."),
    "policies": ("Policies", ":material/rule:", "Schedulers, fairness and the KV cache compared."),
    "plan": ("Plan", ":material/price_check:", "Promises in, cheapest fleets out."),
    "requests": ("Requests", ":material/view_timeline:", "Single requests: where each waited, and for what."),
    "calibration": ("Calibration", ":material/target:", "How far the numbers can be trusted."),
}

ABOUT = f"**llmsim {__version__}**: replays request traces on simulated LLM-serving engines, with measured cost models."


def settle() -> None:
    """After a shared link: one more run, which the browser asks for.

    Streamlit 1.67 hands the settings of a page on to the next one, but not those that came with an address and were
    there in one run only.
    """
    st.session_state["settled"] = "asked" in st.session_state
    st.session_state["asked"] = True
    if st.session_state["settled"]:
        st.rerun()


here = Path(__file__).parent
# a file: an icon by name is fetched from another host
st.set_page_config(
    page_title="llmsim",
    page_icon=str(here / "app_pages" / "icon.png"),
    layout="wide",
    menu_items={"About": ABOUT},  # without an entry of its own the menu is left out, and the choice of theme with it
)
pages = [
    st.Page(here / "app_pages" / f"{name}.py", title=title, icon=icon, help=about, default=name == "what_if")
    for name, (title, icon, about) in PAGES.items()
    if (here / "app_pages" / f"{name}.py").is_file()
]
page = st.navigation(pages, position="top")
with checked_link():
    page.run()
if not st.session_state.setdefault("settled", not st.query_params):
    st.fragment(run_every=0.25)(settle)()
