"""The one style sheet of the reports: light and dark as the reader's system is, one column where it is narrow."""

from __future__ import annotations

CSS = """
:root { color-scheme: light dark; --paper: #fbfbf9; --card: #ffffff; --ink: #1d1f22; --faint: #666b73; --line: #e2e2dc;
  --good: #3b8f5c; --outline: #e0a33a; --wrong: #d5493d; --missed: #3f74d8; --accent: #33557f; --shade: 51, 85, 127; }
@media (prefers-color-scheme: dark) { :root { --paper: #15171a; --card: #1d2024; --ink: #e8e8e4; --faint: #9aa0a8;
  --line: #33373d; --good: #58b57d; --outline: #e9b85c; --wrong: #ec6f63; --missed: #7ba4f2; --accent: #9bbbe6;
  --shade: 140, 175, 225; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 25px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 38px 0 6px; }
p { margin: 4px 0 12px; color: var(--faint); max-width: 78ch; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(136px, 1fr)); gap: 10px; margin: 20px 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px; }
.tile b { display: block; font-size: 25px; font-variant-numeric: tabular-nums; line-height: 1.3; }
.tile span { color: var(--faint); font-size: 13px; display: block; line-height: 1.35; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 12px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; color: var(--faint); font-size: 13px; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
table.facts td { white-space: normal; overflow-wrap: anywhere; text-align: left; vertical-align: top; }
table.facts td:first-child { color: var(--faint); white-space: nowrap; }
table.matrix td, table.matrix th { padding: 3px 7px; font-size: 12.5px; }
table.matrix th { vertical-align: bottom; }
table.matrix thead th span { writing-mode: vertical-rl; transform: rotate(180deg); }
.bars { display: grid; grid-template-columns: max-content 1fr max-content max-content; gap: 5px 12px;
  align-items: center; font-variant-numeric: tabular-nums; }
.bars .name { max-width: 220px; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.bars .number { text-align: right; }
.bars .head { color: var(--faint); font-size: 13px; }
.bar { display: flex; height: 15px; background: var(--line); border-radius: 3px; overflow: hidden; min-width: 60px; }
.bar i { display: block; height: 100%; }
.bars.five { grid-template-columns: max-content minmax(60px, 1fr) repeat(3, max-content); }
.bars .pair { min-width: 60px; } .pair i { display: block; height: 7px; border-radius: 2px; min-width: 1px;
  box-shadow: 0 0 0 1px var(--line); }
.pair i + i { margin-top: 3px; } .bars.five + p { margin-top: 12px; }
.key { display: flex; flex-wrap: wrap; gap: 4px 18px; color: var(--faint); font-size: 13px; margin: 4px 0 12px; }
.key i { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 6px; }
.range { position: relative; height: 15px; background: var(--line); border-radius: 3px; min-width: 90px; }
.range i { position: absolute; top: 6px; height: 3px; background: var(--faint); }
.range u { position: absolute; top: 0; bottom: 0; width: 1px; background: var(--ink); opacity: .45; }
.range b { position: absolute; top: 3px; width: 9px; height: 9px; margin-left: -4px; border-radius: 50%; }
figure { margin: 0 0 18px; background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px; }
figcaption { font-size: 13px; color: var(--faint); margin-bottom: 7px; overflow-wrap: anywhere; }
figcaption b { color: var(--ink); }
figure p.sentence { margin: 8px 0 0; color: var(--ink); font-size: 13px; max-width: none; overflow-wrap: anywhere; }
.panels { display: grid; grid-template-columns: repeat(4, 1fr); gap: 6px; }
.panels img { width: 100%; height: auto; display: block; border-radius: 3px; }
.panels span { font-size: 12px; color: var(--faint); }
.panels.two { grid-template-columns: repeat(2, 1fr); }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 560px), 1fr)); gap: 0 20px; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 430px), 1fr)); gap: 14px; }
.figures figure { margin: 0; }
svg { max-width: 100%; min-width: 560px; height: auto; margin-top: 14px; }
svg text { fill: var(--ink); font: 13px system-ui, sans-serif; }
svg rect { fill: var(--accent); } svg rect.second { fill: var(--outline); } svg circle.many { fill-opacity: .45; }
svg .faint { fill: var(--faint); } svg line { stroke: var(--line); } svg circle { fill: var(--accent); }
.plots svg { min-width: 300px; overflow: visible; }
@media (max-width: 620px) { .plots svg text { font-size: 18px; } .plots svg .beside { transform: translateY(-9px); } }
@media (max-width: 720px) { .panels, .panels.two { grid-template-columns: repeat(2, 1fr); }
  main { padding: 18px 12px 40px; }
  .bars .name { max-width: 110px; } th, td { padding: 4px 8px; } h1 { font-size: 20px; } }
"""
