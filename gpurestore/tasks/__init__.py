"""One module per kernel resource: how a dump collects it and how a restore plans it.

They have words in common. At dump, of a frozen task:

    questions()      calls by name whose answers only the task itself knows; its agent runs them
    collect(...)     those answers, and what /proc tells, put into the messages of an image, or into *facts*
                     (facts.py, filefacts.py) where CRIU's format has no field
    findings(...)    what cannot be carried

At restore, out of what an image says; nothing in it is trusted:

    check(...)       what stands against it here, as findings, before anything is created
    plan...(...)     calls for the restored task, pure; the name says when, where there are several
"""
