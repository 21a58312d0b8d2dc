"""The page's style: one column on a phone, light or dark as the reader's system is."""

__all__ = ["STYLE"]

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #5c6670; --line: #d9dee3; --paper: #fff; --card: #f5f7f9;
  --bad: #c62828; --good: #1b7f3b; --warn: #9a6700; --plain: #54708c; --p0: #3b6fb6; --p1: #e08a2e; --p2: #4f9d69;
  --p3: #b8495b; --p4: #7d68b5; --p5: #8b6f5a; --p6: #c777a9; --p7: #6f7b86 }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaee; --soft: #9aa5b1; --line: #333b44; --paper: #14181c;
  --card: #1d2329; --bad: #ff7b72; --good: #56c271; --warn: #e3b341; --plain: #8fb0d0; --p0: #6ea0e0; --p1: #f0a95a;
  --p2: #77c394; --p3: #de7f8d; --p4: #a896dc; --p5: #b99d86; --p6: #e0a0c8; --p7: #98a4b0 } }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 76rem; padding: 1.25rem 1rem 4rem;
  color: var(--ink); background: var(--paper) }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .2rem 0 .4rem } h1.bad { color: var(--bad) }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem } p { margin: .4rem 0 } .soft { color: var(--soft) }
.tiles { display: flex; flex-wrap: wrap; gap: .5rem; margin: 1rem 0 }
.tile { background: var(--card); border-radius: .5rem; padding: .45rem .9rem; font-size: .8rem; color: var(--soft) }
.tile b { display: block; font-size: 1.35rem; line-height: 1.2 }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 0 2rem }
.pair > section { min-width: 0 }
.wide { overflow-x: auto; margin: .5rem 0 }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; width: 100% }
th, td { padding: .3rem .7rem; text-align: right; white-space: nowrap; vertical-align: top }
th { color: var(--soft); font-weight: 500; border-bottom: 1px solid var(--line) }
td + td { border-left: 0 } tbody tr + tr td { border-top: 1px solid var(--line) }
.name { text-align: left; white-space: normal; min-width: 11rem; overflow-wrap: anywhere } .left { text-align: left }
.note { text-align: left; white-space: normal; color: var(--soft) }
.verdict { font-weight: 600; font-size: .78rem } .peer { opacity: .65 }
.slower, .error, .missing, .worse { color: var(--bad) } .faster, .better { color: var(--good) }
.inconclusive, .contaminated, .incomparable, .toolchain, .changed-figure, .unpinned { color: var(--warn) }
.same, .new, .skipped { color: var(--soft) }
svg.chart { display: block; width: 100%; max-width: 40rem; height: auto } svg.spark { display: block; width: 100%;
  height: 3.4rem } svg text { font: 11px system-ui, sans-serif; fill: var(--soft) } svg .label { fill: var(--ink) }
.grid { stroke: var(--line) } .ceiling { stroke: var(--soft); stroke-dasharray: 4 3 }
.mark { fill: var(--plain) } .shaft { stroke: var(--plain); stroke-width: 1.6 }
.mark.v-slower { fill: var(--bad) } .shaft.v-slower { stroke: var(--bad) } .mark.v-faster { fill: var(--good) }
.shaft.v-faster { stroke: var(--good) } .mark.v-inconclusive, .mark.v-contaminated { fill: var(--warn) }
.shaft.v-inconclusive, .shaft.v-contaminated { stroke: var(--warn) }
.band { fill: var(--plain); opacity: .22 } .trend { fill: none; stroke: var(--plain); stroke-width: 1.5;
  vector-effect: non-scaling-stroke } .changed { stroke: var(--warn); stroke-dasharray: 3 2 }
.p0 { fill: var(--p0) } .p1 { fill: var(--p1) } .p2 { fill: var(--p2) } .p3 { fill: var(--p3) } .p4 { fill: var(--p4) }
.p5 { fill: var(--p5) } .p6 { fill: var(--p6) } .p7 { fill: var(--p7) }
.sparks { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); gap: .8rem 1.2rem }
.sparks figure { margin: 0 } figcaption { font-size: .8rem; color: var(--soft); overflow-wrap: anywhere }
details { margin: .6rem 0 } summary { cursor: pointer } ul { margin: .4rem 0; padding-left: 1.2rem }
.key { font-size: .85rem; color: var(--soft) }
@media (max-width: 40rem) { h1 { font-size: 1.25rem } th, td { padding: .3rem .35rem } .name { min-width: 10rem } }
"""
