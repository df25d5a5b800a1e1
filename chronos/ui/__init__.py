"""`chronos ui`: pages in a browser over the commands.

Whatever takes time is a job: a command of Chronos in a process of its own, with a log of lines in
its run folder (`jobs`). Pages (`pages/`) show what such files and a few quick functions say, and
keep nothing themselves, so a reload, a second tab or a new start of the UI shows the same.
"""
