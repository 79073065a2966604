"""From rounds to ratios, and to a table."""

import statistics

from bench import SCENARIOS

PERCENTILES = ("p50", "p99", "p99.9")


def valid_rounds(cells):
    """Rounds without failed requests and without a starved load: at least half the best rate."""
    rates = [cell["requests_per_second"] for cell in cells if cell]
    best = max(rates, default=0)
    return {
        number for number, cell in enumerate(cells)
        if cell and cell["requests_per_second"] >= best / 2
    }


def spread(values):
    if not values:
        return None
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summarize(results, names):
    """Per scenario and proxy: medians, the range, and ours divided by theirs, round by round."""
    summary = {}
    for scenario, cells in results.items():
        valid = {name: valid_rounds(cells[name]) for name in cells}
        rows = summary[scenario] = {}
        for name in cells:
            rounds = sorted(valid[name])
            row = {
                "rounds": len(rounds),
                "dropped": len(cells[name]) - len(rounds),
                "requests_per_second": spread([cells[name][r]["requests_per_second"] for r in rounds]),
            }
            if name != "direct":
                row["cpu_us"] = spread([cells[name][r]["cpu_us"] for r in rounds])
                if names[0] in cells and name != names[0]:
                    both = sorted(valid[names[0]] & valid[name])
                    row["ours_divided_by_theirs"] = spread(
                        [cells[names[0]][r]["cpu_us"] / cells[name][r]["cpu_us"] for r in both]
                    )
            if rounds and "latency_us" in cells[name][rounds[0]]:
                row["lag_p99_us"] = spread([cells[name][r]["lag_us"]["p99"] for r in rounds])
                against = sorted(valid["direct"] & valid[name])
                for percentile in PERCENTILES:
                    row[f"{percentile}_us"] = spread(
                        [cells[name][r]["latency_us"][percentile] for r in rounds]
                    )
                    row[f"added_{percentile}_us"] = spread([
                        cells[name][r]["latency_us"][percentile]
                        - cells["direct"][r]["latency_us"][percentile] for r in against
                    ])
            rows[name] = row
    return summary


def ranged(value, digits=1):
    if value is None:
        return "-"
    return f"{value['median']:.{digits}f} ({value['min']:.{digits}f}..{value['max']:.{digits}f})"


def print_table(summary, memory, missing, names):
    for scenario, rows in summary.items():
        print(f"\n{scenario}: {SCENARIOS[scenario].about}")
        rated = any("added_p50_us" in row for row in rows.values())
        header = f"  {'':<10} {'CPU us/request':<22} {'requests/s':>10}  {'ours/theirs':<20}"
        if rated:
            header += f" {'added p50 us':<18} {'p99':<22} {'p99.9':<24} lag p99"
        print(header)
        for name, row in rows.items():
            rate = row["requests_per_second"]
            line = f"  {name:<10} {ranged(row.get('cpu_us')):<22} "
            line += f"{rate['median'] if rate else 0:>10,.0f}  "
            line += f"{ranged(row.get('ours_divided_by_theirs'), 2):<20}"
            if rated:
                line += f" {ranged(row.get('added_p50_us'), 0):<18}"
                line += f" {ranged(row.get('added_p99_us'), 0):<22}"
                line += f" {ranged(row.get('added_p99.9_us'), 0):<24} {ranged(row.get('lag_p99_us'), 0)}"
            if row["dropped"]:
                line += f"  [{row['dropped']} of {row['dropped'] + row['rounds']} rounds dropped]"
            print(line.rstrip())
        for name, why in missing.get(scenario, {}).items():
            print(f"  {name:<10} {why}")
    if memory:
        print("\nmemory: resident; per connection of HTTP/1.1, KiB")
        print(f"  {'':<10} {'start MiB':>10} {'never used':>11} {'idle':>7} {'in flight':>10}")
        for name, row in memory.items():
            print(f"  {name:<10} {row['start_mib']:>10.1f} {row['opened_kib']:>11.1f} "
                  f"{row['idle_kib']:>7.1f} {row['in_flight_kib']:>10.1f}")


def why_missing(name, kind):
    return {"nginx": "no HTTP/2 towards a service"}.get(name, "does not do this")
