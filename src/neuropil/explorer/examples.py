"""The queries that the SQL page offers."""

from __future__ import annotations

from neuropil.explorer.facts import Facts

EXAMPLES = (
    (
        "Strongest suppressors",
        "SELECT neuron, label, effect, effect_se, cos_up, cos_down\nFROM neurons\n"
        "WHERE verdict = 'suppresses' AND NOT hub\nORDER BY effect\nLIMIT 50",
    ),
    (
        "Confirmed, by layer",
        "SELECT layer, count(*) AS neurons, avg(specialised::INT) AS specialised,\n"
        "       avg(confirmed::INT) AS confirmed\nFROM neurons\nGROUP BY layer\nORDER BY layer",
    ),
    (
        "Words with most neurons",
        "SELECT label, count(*) AS neurons, max(specialisation) AS best\n"
        "FROM neurons\n"
        "WHERE specialised AND NOT hub AND label <> ''\nGROUP BY label\nORDER BY neurons DESC\nLIMIT 50",
    ),
    ("What can be asked", "DESCRIBE neurons"),
)
EXAMPLES_SEEN = (
    (
        "Most selective",
        "SELECT neuron, preferred_class, selectivity, activation_max\nFROM neurons\nWHERE NOT dead\n"
        "ORDER BY selectivity DESC NULLS LAST\nLIMIT 50",
    ),
    (
        "Missed most",
        "SELECT neuron, ablation, ablation_se, ablation_estimate\nFROM neurons\nWHERE ablation > 2 * ablation_se\n"
        "ORDER BY ablation DESC\nLIMIT 50",
    ),
    (
        "By layer",
        "SELECT site, module, count(*) AS neurons, sum(dead::INT) AS dead, avg(sparsity) AS sparsity\n"
        "FROM neurons\nGROUP BY ALL\nORDER BY site",
    ),
    ("What can be asked", "DESCRIBE neurons"),
)


def examples(facts: Facts) -> list[tuple[str, str]]:
    """The example questions that this atlas can answer."""
    if not facts.sees:
        return list(EXAMPLES)
    needs = {"Most selective": "selectivity", "Missed most": "ablation", "By layer": "sparsity"}
    return [(name, sql) for name, sql in EXAMPLES_SEEN if needs.get(name, "neuron") in facts.columns]
