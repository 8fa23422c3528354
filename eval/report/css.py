"""The page's style sheet: system fonts, one column, light and dark, printable."""

CSS = """
:root { --ink:#1c2430; --muted:#5f6b7a; --line:#e1e6ec; --soft:#f6f7f9; --page:#ffffff;
  --accent:#8a2d6b; --good:#0b6e4f; --fair:#8a5a00; --poor:#a3341c; --card:#ffffff; }
@media (prefers-color-scheme: dark) { :root { --ink:#e6e9ee; --muted:#9aa5b3; --line:#2c3440;
  --soft:#1b212a; --page:#12161c; --accent:#e08cc0; --good:#5cc8a0; --fair:#e0b050; --poor:#f09078;
  --card:#181d25; } }
* { box-sizing:border-box; }
html { scroll-behavior:smooth; -webkit-text-size-adjust:100%; }
body { margin:0; background:var(--page); color:var(--ink);
  font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif; }
main { max-width:1100px; margin:0 auto; padding:56px 32px 96px; }
.eyebrow { color:var(--accent); font-size:13px; font-weight:600; letter-spacing:.06em;
  text-transform:uppercase; margin:0 0 8px; }
h1 { font-size:34px; line-height:1.2; letter-spacing:-.015em; margin:0 0 16px; font-weight:680;
  overflow-wrap:anywhere; }
h2 { font-size:23px; line-height:1.3; letter-spacing:-.01em; margin:0 0 12px; font-weight:650; }
h3 { font-size:16px; margin:36px 0 8px; font-weight:650; }
p { margin:0 0 14px; max-width:46em; }
.lead { font-size:19px; line-height:1.5; max-width:44em; overflow-wrap:anywhere; }
section { margin-top:72px; }
.anchor { color:var(--line); text-decoration:none; font-weight:400; }
h2:hover .anchor { color:var(--accent); }
a { color:var(--accent); }
nav { display:flex; flex-wrap:wrap; gap:4px 22px; margin:28px 0 0; padding:12px 0;
  border-top:1px solid var(--line);
  border-bottom:1px solid var(--line); font-size:14px; }
nav a { text-decoration:none; white-space:nowrap; }
nav a:hover { text-decoration:underline; }
.facts { display:flex; flex-wrap:wrap; gap:14px 40px; margin:24px 0; }
.facts dt { color:var(--muted); font-size:12.5px; }
.facts dd { margin:0; font-size:15px; font-variant-numeric:tabular-nums; overflow-wrap:anywhere; }
.cards { display:grid; grid-template-columns:repeat(auto-fit,minmax(280px,1fr)); gap:16px;
  margin:24px 0 0; }
.card { background:var(--card); border:1px solid var(--line); border-top:3px solid var(--muted);
  border-radius:8px; padding:16px 18px; }
.card.beats { border-top-color:var(--good); } .card.ahead { border-top-color:var(--fair); }
.card.behind { border-top-color:var(--poor); }
.card h3 { margin:0 0 2px; font-size:14px; color:var(--muted); font-weight:600; }
.card .big { font-size:32px; font-weight:650; letter-spacing:-.02em; line-height:1.25;
  font-variant-numeric:tabular-nums; }
.card .of { color:var(--muted); font-size:13px; font-variant-numeric:tabular-nums; }
.card p { font-size:14px; line-height:1.5; margin:10px 0 0; }
.card ul { list-style:none; margin:6px 0 0; padding:0; font-size:13.5px; line-height:1.45;
  font-variant-numeric:tabular-nums; }
.card li { padding:2px 0; }
.card p:empty { display:none; }
.card .state { font-weight:650; }
.beats .state { color:var(--good); }
.ahead .state { color:var(--fair); }
.behind .state { color:var(--poor); }
.scroll { overflow-x:auto; margin:20px 0; }
table { border-collapse:collapse; width:100%; font-size:14.5px; line-height:1.35; }
th { text-align:left; font-weight:600; color:var(--muted); font-size:13px; vertical-align:bottom; }
th,td { padding:7px 10px; border-bottom:1px solid var(--line); }
td { vertical-align:top; }
th:first-child, td:first-child { padding-left:0; }
.num { text-align:right; font-variant-numeric:tabular-nums; }
td.num { white-space:nowrap; }
td:first-child { min-width:11em; }
.group th { color:var(--ink); padding-top:24px; font-size:15px;
  border-bottom:1px solid var(--ink); }
.ci { display:block; color:var(--muted); font-size:12px; font-weight:400; }
.ours { font-weight:650; color:var(--accent); overflow-wrap:anywhere; }
.floor { color:var(--muted); }
.swatch { display:inline-block; width:12px; height:12px; border-radius:3px; margin-right:8px;
  vertical-align:-1px; }
.legend { display:flex; flex-wrap:wrap; gap:6px 24px; font-size:14px; margin:0 0 16px; }
figure { margin:28px 0 40px; }
figure img { display:block; max-width:100%; height:auto; background:#fff; }
figcaption { color:var(--muted); font-size:14px; line-height:1.5; margin-top:12px; max-width:54em; }
.beware { color:var(--ink); }
.beware::before { content:"Beware: "; font-weight:650; }
.missing { color:var(--muted); font-style:italic; }
pre { background:var(--soft); border-radius:8px; padding:14px 18px; overflow-x:auto; font-size:13px;
  line-height:1.5; }
code { font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace; }
details { margin:14px 0; } summary { cursor:pointer; color:var(--accent); font-size:15px; }
details table { font-size:13px; }
footer { margin-top:80px; padding-top:16px; border-top:1px solid var(--line); color:var(--muted);
  font-size:13px; }
@media (prefers-color-scheme: dark) { figure img { padding:10px; border-radius:6px; } }
@media (max-width:640px) { main { padding:32px 18px 64px; } h1 { font-size:27px; } }
@media print { :root { --ink:#000; --muted:#444; --line:#ccc; --soft:#f4f4f4; --page:#fff;
  --card:#fff; --accent:#8a2d6b; --good:#0b6e4f; --fair:#8a5a00; --poor:#a3341c; }
  main { max-width:none; padding:0; } body { font-size:10.5pt; } nav,.anchor { display:none; }
  section { margin-top:28pt; } figure,.card,tr { break-inside:avoid; } h2,h3 { break-after:avoid; }
  figure img { padding:0; } .scroll { overflow:visible; } table { font-size:8pt; }
  th { font-size:7.5pt; } .ci { font-size:6.5pt; } th,td { padding:3px 4px; }
  td:first-child { min-width:7em; } .cards { grid-template-columns:repeat(3,1fr); gap:8px; }
  .card { padding:8px 10px; } .card p,.card ul { font-size:8.5pt; } .card .of { font-size:8pt; } }
"""
